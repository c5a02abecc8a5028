"""Where the tensors of an adapter's file stand in a model, and their values in and out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ._library import library
from .adapted import Adapted, HeldAdapter, StoredAdapter
from .file_config import EMBEDDING_PARTS, LINEAR_PARTS, TRIPLET_PARTS, Adapters, saved_tensors
from .sharding import (
    assign,
    check_gathered,
    check_matrices,
    is_sharded,
    kind_without_memory,
    shared_outcome,
    whole,
)

_Key = library.AdapterKey


@dataclass(frozen=True)
class Slot:
    """The leading `rank` directions of a factor, along `dim`; or with rank None all of a tensor.

    To read, `first` is more directions behind them, which do not train.
    """

    tensor: Tensor
    dim: int = 0
    rank: int | None = None
    first: Tensor | None = None

    @property
    def shape(self) -> list[int]:
        sizes = list(self.tensor.shape)
        if self.rank is not None:
            sizes[self.dim] = self.rank
        return sizes

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def kind(self) -> str:
        """What the tensor is instead when it can be neither read nor written; "" for most."""
        return "" if is_sharded(self.tensor) else kind_without_memory(self.tensor)

    @property
    def why_not_filled(self) -> str:
        """Why fill() cannot write the tensor; "" when it can."""
        if self.kind:
            return f"must be dense, with data, got {self.kind}"
        if self.first is not None:
            return (
                "adapter begins inside the base (first_values) and a folder's does not; load it "
                "under another name, or delete_adapter() first"
            )
        overlaps = not is_sharded(self.tensor) and library.has_overlap(self.tensor)
        return "has elements that share memory" if overlaps else ""

    def value(self) -> Tensor:
        """The values, detached; of a DTensor gathered, for which all its processes must ask.

        A tensor that cannot be read comes as it is: who reads it refuses it by name.
        """
        if self.kind:
            return self.tensor
        value = self._directions(whole(self.tensor).detach())
        if self.first is None:
            return value
        return torch.cat([value, self.first.to(value.device)], self.dim)

    def fill(self, value: Tensor) -> None:
        """Writes the values; a sharded factor's directions behind `rank`, not in use, become 0."""
        target = self.tensor.detach()
        if not is_sharded(target):
            self._directions(target).copy_(value)
            return
        full = torch.zeros(target.shape, dtype=value.dtype)
        self._directions(full).copy_(value)
        assign(target, full)

    def _directions(self, tensor: Tensor) -> Tensor:
        return tensor if self.rank is None else tensor.narrow(self.dim, 0, self.rank)


def factors_of(adapter: HeldAdapter | StoredAdapter) -> list[Slot]:
    """lora_A, lora_B and, of AdaLoRA, lora_E: the directions in use."""
    first, rank = adapter.lora_first, adapter.rank
    A0, B0 = (None, None) if first is None else (first.lora_A, first.lora_B)
    slots = [Slot(adapter.lora_A, 0, rank, A0), Slot(adapter.lora_B, 1, rank, B0)]
    return slots if adapter.lora_E is None else [*slots, Slot(adapter.lora_E, 0, rank)]


def slots_of(
    operation: str,
    layers: Mapping[str, Adapted],
    adapters: Adapters,
    copies: Mapping[str, nn.Module],
) -> dict[str, Slot]:
    """{PEFT's key: the place it stands for}: active directions, and modules trained whole.

    Raises:
        ValueError: a factor was flattened by FullyShardedDataParallel, or a tensor partitioned by
            DeepSpeed's ZeRO-3.
    """
    slots: dict[str, Slot] = {}
    for path, adapter in adapters.items():
        linear = LINEAR_PARTS if adapter.lora_E is None else TRIPLET_PARTS
        parts = EMBEDDING_PARTS if isinstance(layers[path], nn.Embedding) else linear
        for part, slot in zip(parts, factors_of(adapter), strict=True):
            slots[str(_Key(path, part))] = slot
    check_matrices(operation, {key: slot.tensor for key, slot in slots.items()})
    for path, module in copies.items():
        check_gathered(operation, {f"{path}.{key}": p for key, p in module.named_parameters()})
        for key, tensor in saved_tensors(path, module).items():
            slots[key] = Slot(tensor)
    return slots


def write_folder(directory: str | os.PathLike, file, mesh) -> None:
    """Writes an adapter's folder, over a mesh in its first process alone."""
    with shared_outcome(mesh) as first:
        if first:
            library.write_adapter(directory, file)
