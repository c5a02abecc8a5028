"""Merging an adapter's folder into a model's folder, one tensor in memory at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import ops
from .folder_changes import Change
from .merging import MergeReport
from .model_folder import ModelFolder, read_bytes, tensor_of
from .new_folder import new_folder


def merge_folder(
    folder: ModelFolder, changes: Sequence[Change], output: str | os.PathLike
) -> Iterator[tuple[str, MergeReport]]:
    """Writes the model's folder with the changes, each reported as it is made.

    As rw.merge(): the sum is formed in float64 and rounded once to the tensor's dtype. Files are
    copied, so that the headers stay, and the tensors written in place. `output` appears after the
    last report, when all is on the disk; an error or a kill before leaves none.

    Raises:
        FileError: `output` is no new or empty folder, or is being written.
        ValueError: a weight would not be finite.
    """
    with new_folder(output) as staged:
        for path in _files(folder):
            (staged / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder.path / path, staged / path)
        for change in changes:
            yield change.name, _write(change, staged / change.stored.file.name)


def _files(folder: ModelFolder) -> Iterator[Path]:
    yield from (shard.relative_to(folder.path) for shard in folder.shards)
    yield from (path for path, needed in folder.others() if needed)


def _write(change: Change, copy: Path) -> MergeReport:
    memory = read_bytes(change.stored)
    base = tensor_of(memory, change.stored)
    merged, error = _merged(change, base)
    if not merged.isfinite().all():
        raise ValueError(f"{change.name}: would not be finite in {base.dtype}; nothing was written")
    report = MergeReport(error, int(merged.ne(base).sum()), base.numel())
    base.copy_(merged)
    with open(copy, "r+b") as file:
        file.seek(change.stored.start)
        file.write(memory)
    return report


def _merged(change: Change, base: Tensor) -> tuple[Tensor, float]:
    """What takes the base's place, and the largest rounding error."""
    weight, error = base, 0.0
    if change.value is not None:
        weight = change.value.to(base.dtype)
        wide = torch.promote_types(change.value.dtype, base.dtype)
        if weight.dtype != change.value.dtype and weight.numel():
            error = (weight.to(wide) - change.value.to(wide)).abs().max().item()
    if change.update is None:
        return weight, error
    factors = [factor.to(change.factor_dtype) for factor in change.factors]
    matrix = weight.t() if change.transposed else weight
    merged, largest, _ = ops.merged_weight(matrix, *factors, scaling=change.update.scaling)
    return merged.t() if change.transposed else merged, largest.item()
