"""An adapter's folder as a plain LoRA folder."""

from __future__ import annotations

import os

import torch

from . import ops
from ._library import library
from .config import NARROW


def export_folder(
    folder: str | os.PathLike, directory: str | os.PathLike, dtype: torch.dtype | None = None
) -> list[str]:
    """Writes any adapter's folder as export_lora does a model's adapter.

    One rank for all modules, the largest, reached with zeros; scale 1; no patterns. lora_E and the
    scaling go into lora_B, computed in float64 and rounded once. Modules of rank 0 are left out,
    those trained whole are carried over.

    Args:
        folder: of LoRA or AdaLoRA.
        directory: created if missing.
        dtype: of all tensors; None for their own.

    Returns:
        The tensors carried over.

    Raises:
        ValueError: every module has rank 0, or a value would not be finite in the dtype.
        FileError: a folder cannot be read or written.
    """
    file = library.read_adapter(folder)
    updates = library.updates_of(file)
    whole = {key: tensor for key, tensor in file.tensors.items() if _is_saved(key)}
    if dtype is not None:
        updates = [_folded(update, dtype) for update in updates]
        whole = {key: tensor.to(dtype) for key, tensor in whole.items()}
    exported = library.fold_adapter(updates, file.config)
    tensors = exported.tensors | whole
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"export: {key} would not be finite in {tensor.dtype}")
    library.write_adapter(directory, library.AdapterFile(exported.config, tensors))
    return list(whole)


def _is_saved(key: str) -> bool:
    return library.parse_adapter_key(key).part == library.AdapterKey.Part.saved


def _folded(update, dtype: torch.dtype):
    """The update with scaling and lora_E in lora_B; float64 factors become the dtype's first."""
    wide = torch.float32 if dtype in NARROW else dtype
    B = update.lora_B.to(wide)
    E = None if update.lora_E is None else update.lora_E.to(wide)
    zeros, eye = torch.zeros_like(B, dtype=dtype), torch.eye(B.shape[1], dtype=wide)
    folded, *_ = ops.merged_weight(zeros, eye, B, E, scaling=update.scaling)
    A = update.lora_A.to(dtype)
    return library.AdapterUpdate(update.module, A, folded, None, 1.0, update.embedding)
