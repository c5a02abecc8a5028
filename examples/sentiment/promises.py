"""What a trained adapter must keep: accuracy, its logits through files and merging, the base."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from batches import TokenizedSnippets
from classifier import Classifier, load_encoder, new_classifier, predict
from peft import PeftModel
from torch import Tensor, nn

import rankwise as rw

MINIMUM_ACCURACY = 0.83
PEFT_LIMIT = 1e-5  # largest difference of a logit after the round trip through the files
MERGED_LIMIT = 1e-4  # and of merged weights: one rounding to float32 of each, through 6 layers
# PEFT checks AdaLoRA's rank_pattern, whose keys are parameters, as LoRA's, whose keys are modules.
FALSE_ALARM = r"The following rank_pattern keys did not match any targeted module .*\.lora_E'"
INSTEAD = (
    "PEFT's warning of an ignored rank_pattern is left out: its check is for LoRA's, "
    "AdaLoRA's is used"
)


@dataclass(frozen=True)
class Promise:
    """One thing that was checked, what came out, what was promised, and whether it was kept."""

    what: str
    measured: str
    promised: str
    kept: bool


def accuracy_promise(method: str, accuracy: float) -> Promise:
    return Promise(
        f"{method}: accuracy",
        f"{accuracy:.4f}",
        f"at least {MINIMUM_ACCURACY}",
        accuracy >= MINIMUM_ACCURACY,
    )


def check_adapter(
    method: str, model: Classifier, test: TokenizedSnippets, folder: Path
) -> list[Promise]:
    """Saves the model's adapter to `folder`, reloads it with stock PEFT, merges and unmerges."""
    expected = predict(model, test)
    rw.save_adapter(model, folder)
    # Another seed: the head's weights, too, must come from the folder.
    reloaded = load_with_peft(new_classifier(seed=12345), folder)
    promises = [
        _logits(f"{method}: logits, reloaded by PEFT", reloaded, expected, test, PEFT_LIMIT)
    ]
    rw.merge(model)
    promises.append(_logits(f"{method}: logits, merged", model, expected, test, MERGED_LIMIT))
    original = load_encoder()
    merged = changed_bits(model.encoder, original)
    rw.unmerge(model)
    promises.append(_logits(f"{method}: logits, unmerged", model, expected, test, 0.0))
    changed = changed_bits(model.encoder, original)
    measured = f"{changed:,} (merged: {merged:,})"
    promises.append(
        Promise(f"{method}: encoder bits, unmerged", measured, "0 changed", changed == 0)
    )
    return promises


def load_with_peft(base: nn.Module, folder: Path) -> PeftModel:
    """The adapter in stock PEFT; of PEFT's false alarm, a name for each layer, one line is left."""
    with warnings.catch_warnings(record=True) as caught:
        model = PeftModel.from_pretrained(base, folder)
    for warning in caught:
        if re.match(FALSE_ALARM, str(warning.message)):
            print(INSTEAD)
        else:
            where = warning.category, warning.filename, warning.lineno
            warnings.warn_explicit(warning.message, *where)
    return model


def _logits(
    what: str, model: nn.Module, expected: Tensor, test: TokenizedSnippets, limit: float
) -> Promise:
    difference = (predict(model, test) - expected).abs().max().item()
    promised = f"at most {limit:.0e}" if limit else "equal"
    return Promise(what, f"difference {difference:.1e}", promised, difference <= limit)


def changed_bits(adapted: nn.Module, original: nn.Module) -> int:
    """The number of bits in which the parameters under the adapters differ from the original's.

    Raises:
        KeyError: `adapted` lacks a parameter of `original`.
    """
    parameters = dict(adapted.named_parameters())
    return sum(
        int(np.bitwise_count(_bytes(parameters[name]) ^ _bytes(parameter)).sum())
        for name, parameter in original.named_parameters()
    )


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().view(torch.uint8).numpy()
