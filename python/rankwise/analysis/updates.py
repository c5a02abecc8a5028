"""The updates of adapters: made of tensors, or found in layers, models and folders."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from .._library import library
from ..adapted import Adapted, HeldAdapter
from ..config import _is_integer, _is_real, _require
from ..file_config import adapter_of
from ..file_slots import factors_of
from ..sharding import check_matrices, reshard


@dataclass(frozen=True, eq=False, repr=False)
class Update:
    """What an adapter adds to one weight: ``scaling * lora_B diag(lora_E) lora_A``.

    Args:
        lora_A: ``[rank, in]``; of an embedding ``[rank, num_embeddings]``.
        lora_B: ``[out, rank]``; of an embedding ``[embedding_dim, rank]``.
        lora_E: ``[rank, 1]`` or None for ones.
        scaling: finite; usually alpha / rank.
        module: its name, for messages.
        embedding: whether the module is one.
    """

    lora_A: Tensor
    lora_B: Tensor
    lora_E: Tensor | None = None
    scaling: float = 1.0
    module: str = ""
    embedding: bool = False

    def __post_init__(self) -> None:
        for name in ("lora_A", "lora_B", "lora_E"):
            value = getattr(self, name)
            fits = isinstance(value, Tensor) or (name == "lora_E" and value is None)
            _require(fits, "Update", name, "a tensor", value)
        _require(_is_real(self.scaling), "Update", "scaling", "a number", self.scaling)

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    def __repr__(self) -> str:
        shape = [*self.lora_B.shape[:1], *self.lora_A.shape[1:]]
        return f"Update({self.module!r}, {shape}, rank {self.rank}, scaling {self.scaling:g})"

    def dense(self) -> Tensor:
        """dW itself, ``[out, in]``, float64 on the CPU."""
        A, B = (t.detach().to("cpu", torch.float64) for t in (self.lora_A, self.lora_B))
        E = 1 if self.lora_E is None else self.lora_E.detach().to("cpu", torch.float64)
        return self.scaling * B @ (E * A)


def updates(source: str | os.PathLike | nn.Module, name: str | None = None) -> dict[str, Update]:
    """{module: its update} of an adapter of LoRA or AdaLoRA; a model's tensors are shared.

    Args:
        source: a PEFT folder, or a model with adapters.
        name: of a model's adapter; None for the active one.

    Raises:
        ValueError: the model has no such adapter, or its factors are parts of flat parameters
            (FullyShardedDataParallel) or partitioned (ZeRO-3).
        FileError: the folder cannot be read or is damaged.
        TypeError: neither a folder nor a model.
    """
    if isinstance(source, nn.Module):
        reshard(source)
        layers, adapters, _ = adapter_of("updates", source, name)
        return {path: _held("updates", path, a, layers[path]) for path, a in adapters.items()}
    if not isinstance(source, (str, os.PathLike)):
        got = type(source).__name__
        raise TypeError(f"updates: source must be a folder or a model, got {got}")
    return updates_in(library.read_adapter(source))


def updates_in(file) -> dict[str, Update]:
    """{module: its update} of an adapter's file, as the library reads it."""
    return {update.module: result_of(Update, update) for update in library.updates_of(file)}


def tensors_of(update) -> list[Tensor]:
    """lora_A, lora_B and, of AdaLoRA, lora_E; of an Update or the library's form of it."""
    return [t for t in (update.lora_A, update.lora_B, update.lora_E) if t is not None]


def sizes_of(found: Mapping[str, Update]) -> dict[str, tuple[int, int]]:
    """{module: (out, in)}"""
    return {m: (u.lora_B.shape[0], u.lora_A.shape[1]) for m, u in found.items()}


def _held(function: str, path: str, adapter: HeldAdapter, layer: Adapted) -> Update:
    factors = {"lora_A": adapter.lora_A, "lora_B": adapter.lora_B}
    check_matrices(function, {f"{path}.{n}".lstrip("."): factor for n, factor in factors.items()})
    A, B, *E = (slot.value() for slot in factors_of(adapter))
    embedding = isinstance(layer, nn.Embedding)
    return Update(A, B, *(E or [None]), adapter.options.scaling, path, embedding)


def for_library(function: str, argument: str, value: Update | Adapted):
    """The library's form of an update."""
    if isinstance(value, Adapted) and value.adapter is not None:
        value = _held(function, "", value.held_adapter(value.adapter), value)
    if not isinstance(value, Update):
        raise TypeError(
            f"{function}: {argument} must be an Update or a layer with an active adapter, got "
            f"{type(value).__name__}; updates(folder or model) gives a dict of them"
        )
    return library.AdapterUpdate(
        value.module, value.lora_A, value.lora_B, value.lora_E, value.scaling, value.embedding
    )


def read(function: str, argument: str, folder: str | os.PathLike):
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"{function}: {argument} must be a folder, got {type(folder).__name__}")
    return library.read_adapter(folder)


def result_of(cls: type, found):
    """A result of the library as the dataclass of the same fields."""
    return cls(**{field.name: getattr(found, field.name) for field in fields(cls)})


def check_tensor(function: str, name: str, value: Tensor) -> None:
    _require(isinstance(value, Tensor), function, name, "a tensor", value)


def check_integers(function: str, **values: int | None) -> None:
    for name, value in values.items():
        fits = _is_integer(value) or (name == "rank" and value is None)
        _require(fits, function, name, "an integer", value)
        _require(name != "seed" or value >= 0, function, name, "at least 0", value)


def check_list(function: str, name: str, values: object) -> None:
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{function}: {name} must be a list, got {type(values).__name__}")
