"""What an adapter's folder changes in a model's folder, tensor by tensor."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ._library import library
from .analysis.updates import tensors_of
from .config import NARROW
from .files import FileError
from .folder_conv1d import is_conv1d, square_are_conv1d
from .folder_places import places_of, problems_of_ties, stored_at
from .model_folder import DTYPES, ModelFolder, StoredTensor, read_tensor

SHOWN = 10  # problems that an error lists


@dataclass(frozen=True, eq=False)
class Change:
    """Of one tensor.

    Args:
        stored: the tensor.
        name: the module's in the adapter, or that of a parameter that has no update.
        update: library.AdapterUpdate, or None.
        value: what takes the tensor's place before the update, or None.
        transposed: whether an update's [out, in] is stored as [in, out].
    """

    stored: StoredTensor
    name: str
    update: object | None
    value: Tensor | None
    transposed: bool

    @property
    def factors(self) -> list[Tensor]:
        """lora_A, lora_B and, of AdaLoRA, lora_E."""
        return tensors_of(self.update)

    @property
    def factor_dtype(self) -> torch.dtype:
        """In which the factors are merged: the weight's, or float32 over 16 bits."""
        dtype = DTYPES[self.stored.dtype]
        return torch.float32 if dtype in NARROW else dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """What the tensor must have."""
        if self.update is None:
            return tuple(self.value.shape)
        out, n_in = self.update.lora_B.shape[0], self.update.lora_A.shape[1]
        return (n_in, out) if self.transposed else (out, n_in)


def placed_changes(folder: ModelFolder, adapter) -> dict[str, Change]:
    """{the folder's name of a tensor: what an adapter's file makes of it}, by the headers alone.

    Raises:
        FileError: every tensor is named that is missing, or of another shape or dtype.
    """
    updates = {f"{u.module}.weight": u for u in library.updates_of(adapter)}
    values = _values_of(adapter)
    square = square_are_conv1d(folder, adapter.config.fan_in_fan_out)
    placed, problems = {}, []
    for name, place in places_of(dict.fromkeys([*updates, *values]), folder).items():
        update, stored = updates.get(name), stored_at(place, folder)
        module = name if update is None else update.module
        transposed = update is not None and (update.embedding or is_conv1d(place, folder, square))
        placed[place] = Change(stored, module, update, values.get(name), transposed)
        if wrong := _misfit(placed[place]):
            problems.append(f"{place}: {wrong}")
    _refuse(folder, problems)
    return placed


def changes_of(folder: ModelFolder, directory: str | os.PathLike) -> list[Change]:
    """All changes that an adapter's folder makes; none of what the model has already.

    Raises:
        FileError: as placed_changes, a tensor is one parameter with another that is to stay, or
            the adapter's folder cannot be read.
    """
    adapter = library.read_adapter(directory)
    placed = placed_changes(folder, adapter)
    for place, change in list(placed.items()):
        if change.value is not None and _is(change.stored, change.value):
            placed[place] = replace(change, value=None)
    placed = {p: c for p, c in placed.items() if c.update is not None or c.value is not None}
    tied = problems_of_ties({p: None if c.update else c.value for p, c in placed.items()}, folder)
    _refuse(folder, [f"{place}: {wrong}" for place, wrong in tied.items()])
    return [change for place, change in placed.items() if place in folder.tensors]


def _refuse(folder: ModelFolder, problems: list[str]) -> None:
    if problems:
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        lines = "\n  ".join(problems[:SHOWN]) + more
        raise FileError(f"{folder.path}: the adapter does not fit the model:\n  {lines}")


def _values_of(adapter) -> dict[str, Tensor]:
    """{parameter: what takes its place}: modules trained whole, and stored weights of the base."""
    values = {}
    for key, tensor in adapter.tensors.items():
        parsed = library.parse_adapter_key(key)
        if parsed is None or parsed.part != library.AdapterKey.Part.saved:
            continue
        beside = (".original_module", ".modules_to_save")  # PEFT's of a module that is there, too
        if not any(part in parsed.module for part in beside):
            module = parsed.module.replace(".base_layer", "", 1)
            values[f"{module}.{parsed.parameter}"] = tensor
    return values


def _is(stored: StoredTensor, value: Tensor) -> bool:
    found = read_tensor(stored)
    return torch.equal(found, value.to(found.dtype))


def _misfit(change: Change) -> str | None:
    stored, update, value = change.stored, change.update, change.value
    if stored is None:
        new = "" if update else "; a new head: save the whole model that has it, and merge there"
        return f"the model has no such tensor{new}"
    if stored.dtype not in DTYPES:
        return f"must be F64, F32, F16 or BF16, got {stored.dtype}"
    for wanted in (change.shape, change.shape if value is None else tuple(value.shape)):
        if stored.shape != wanted:
            return f"must be {list(wanted)} as in the adapter, got {list(stored.shape)}"
    for factor in change.factors if update else []:
        if torch.promote_types(change.factor_dtype, factor.dtype) != change.factor_dtype:
            return f"{factor.dtype} factors would be rounded to {change.factor_dtype}"
    return None
