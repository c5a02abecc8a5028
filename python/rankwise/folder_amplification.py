"""What an adapter's folder amplifies of the weights in a model's folder."""

from __future__ import annotations

import os

from .analysis import Amplification, Update, amplification_factor
from .analysis.updates import read, result_of
from .folder_changes import placed_changes
from .model_folder import read_model_folder, read_tensor

OWN = 1024  # the smaller side up to which W's own directions, the longest to find, are


def amplifications(
    adapter: str | os.PathLike, model: str | os.PathLike
) -> dict[str, Amplification]:
    """{module: its amplification_factor}, reading one weight of the model at a time.

    Compared with W's own directions where its smaller side is at most 1024; those of larger
    matrices take ten seconds and more each.

    Args:
        adapter: a PEFT folder, of LoRA or AdaLoRA.
        model: its base model's folder, as of transformers' save_pretrained.

    Raises:
        FileError: a folder cannot be read, or the model lacks a module.
    """
    changes = placed_changes(
        read_model_folder(model), read("amplifications", "adapter", adapter)
    ).values()
    found = {}
    for change in changes:
        if change.update is not None:
            stored = read_tensor(change.stored)
            weight = stored.t() if change.transposed else stored
            update = result_of(Update, change.update)
            own = min(weight.shape) <= OWN
            found[change.name] = amplification_factor(weight, update, own=own)
    return found
