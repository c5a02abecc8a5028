"""QLoRA: adapters over SmolLM2-135M in 4 bits (nf4, bitsandbytes), in a loop of its own.

`python examples/smollm2/qlora.py --help`, in the environment of requirements.txt.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from dialogues import Dialogue, load_dialogues, split
from rich.console import Console
from smollm2 import load_model, load_tokenizer
from torch import Tensor, nn
from torch.optim import AdamW
from tqdm import tqdm
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase

import rankwise as rw

BATCH = 8
OUTPUT = Path(__file__).resolve().parents[2] / "build" / "qlora"
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)
console = Console(highlight=False, soft_wrap=True)

Inputs = dict[str, Tensor]  # input_ids, attention_mask, labels, each [batch, length]


def main(
    steps: Annotated[int, typer.Option(min=1, help=f"Of {BATCH} dialogues.")] = 100,
    dialogues: Annotated[int, typer.Option(min=20, help="Of the 899, how many.")] = 899,
    seed: Annotated[int, typer.Option(help="Of the adapter and the batches.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for the adapter.")] = OUTPUT,
) -> tuple[float, float]:
    """Trains LoRA over 4-bit weights; the mean loss of held-out answers before and after.

    Raises:
        RuntimeError: the saved adapter over a new base answers otherwise than the trained one.
    """
    train, test = split(load_dialogues()[:dialogues])
    tokenizer = load_tokenizer()
    torch.manual_seed(seed)
    model = load_model(quantization_config=NF4)
    config = rw.LoRAConfig(rank=8, alpha=16.0, target_modules="all-linear")
    rw.apply_lora(model, config)
    rw.print_trainable_parameters(model)
    console.print(f"base: {model.get_memory_footprint() / 1e6:.0f} MB with the adapter")

    before = held_out_loss(model, tokenizer, test)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    batches = training_batches(tokenizer, train, seed)
    model.train()
    with tqdm(total=steps, disable=not sys.stderr.isatty()) as bar:
        for _ in range(steps):
            loss = model(**next(batches), use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update()
    after = held_out_loss(model, tokenizer, test)
    console.print(f"loss of {len(test)} held-out answers: {before:.3f} before, {after:.3f} after")

    rw.save_adapter(model, output)
    served = load_model(quantization_config=NF4)
    rw.load_adapter(served, output)
    if held_out_loss(served, tokenizer, test) != after:
        raise RuntimeError("the saved adapter over a new base answers otherwise than the trained")
    console.print(f"adapter: {output}, over a new 4-bit base bit for bit as trained")
    return before, after


def training_batches(
    tokenizer: PreTrainedTokenizerBase, dialogues: list[Dialogue], seed: int
) -> Iterator[Inputs]:
    """Without end: each pass in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(dialogues), generator=generator).tolist()
        for start in range(0, len(order), BATCH):
            yield inputs(tokenizer, [dialogues[i] for i in order[start : start + BATCH]])


def inputs(tokenizer: PreTrainedTokenizerBase, dialogues: list[Dialogue]) -> Inputs:
    """Padded on the right; what is learnt is the last turn of each dialogue."""

    def ids(turns: Dialogue, asked: bool) -> list[int]:
        return tokenizer.apply_chat_template(
            turns, add_generation_prompt=asked, return_dict=True, truncation=True, max_length=96
        )["input_ids"]

    whole = [torch.tensor(ids(turns, False)) for turns in dialogues]
    labels = [tokens.clone() for tokens in whole]
    for turns, label in zip(dialogues, labels, strict=True):
        label[: len(ids(turns[:-1], True))] = -100

    def padded(rows: list[Tensor], value: int) -> Tensor:
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    return {
        "input_ids": padded(whole, tokenizer.pad_token_id),
        "attention_mask": padded([torch.ones_like(tokens) for tokens in whole], 0),
        "labels": padded(labels, -100),
    }


@torch.no_grad()
def held_out_loss(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, dialogues: list[Dialogue]
) -> float:
    """The mean over all tokens of the answers, in nats."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(dialogues), BATCH):
        batch = inputs(tokenizer, dialogues[start : start + BATCH])
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        total += model(**batch).loss.item() * tokens
        count += tokens
    return total / count


if __name__ == "__main__":
    typer.run(main)
