"""Adapters in PEFT's folders: save_adapter and load_adapter over the C++ file layer."""

from __future__ import annotations

import difflib
import math
import os
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ._library import library
from .adapted import Adapted, HeldAdapter, StoredAdapter
from .config import AdapterOptions
from .model import (
    ModelAdapters,
    activate_adapter,
    adapted_layers,
    install_adapter,
    prepare_adapter,
)
from .nn import is_adaptable
from .targets import find_whole, has_suffix, module_paths

FileError = library.FileError
_Key, _Part = library.AdapterKey, library.AdapterKey.Part
# A module's adapter in the model (HeldAdapter) or made for it (StoredAdapter): the same attributes.
_Adapters = Mapping[str, HeldAdapter | StoredAdapter]


def save_adapter(model: nn.Module, directory: str | os.PathLike, name: str | None = None) -> None:
    """Writes an adapter as a PEFT LoRA folder: adapter_config.json and adapter_model.safetensors.

    Atomic: a process killed at any moment leaves the folder's old adapter or the new one. Layers of
    rank 0 are left out, for PEFT knows none and they compute their base.

    Args:
        model: with adapters.
        directory: created if missing; stock PEFT reads it with PeftModel.from_pretrained.
        name: of the adapter; None for the active one.

    Raises:
        ValueError: there is no such adapter, or PEFT's LoRA format cannot hold it.
        FileError: the folder cannot be written.
    """
    state = ModelAdapters.of(model)
    name = state.active if name is None else name
    if name not in state.names:
        raise ValueError(f"save_adapter: adapters are {state.names}, got {name!r}")
    layers = {p: m for p, m in adapted_layers(model).items() if name in m.adapter_names}
    held = {path: layer.held_adapter(name) for path, layer in layers.items()}
    held = {path: adapter for path, adapter in held.items() if adapter.rank > 0}
    tensors = _slots(layers, held, state.whole[name])
    config = _config(model, layers, held)
    config.modules_to_save = list(state.whole[name])
    library.write_adapter(directory, library.AdapterFile(config, tensors))


@dataclass(frozen=True)
class LoadReport:
    """What a load with strict=False left out.

    Args:
        missing: tensors of the model's adapter that the file lacks.
        unexpected: tensors of the file that have no place in the model.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


def load_adapter(
    model: nn.Module, directory: str | os.PathLike, strict: bool = True, name: str = "default"
) -> LoadReport:
    """Reads a PEFT LoRA folder into a model and activates the adapter.

    A model without an adapter of this name gets one with the file's ranks and options; otherwise
    the tensors go into the adapter that is there, which must have the same ranks and scalings. The
    file's dtype is kept where the base allows it, widened with a warning where not, never rounded.
    Nothing is changed unless everything fits.

    Args:
        model: plain or with adapters.
        directory: with adapter_config.json and adapter_model.safetensors.
        strict: every tensor must have its place and the reverse; else the report lists the rest.
        name: the adapter's name in the model.

    Raises:
        FileError: the folder cannot be read, is damaged, or does not fit the model: every missing,
            extra or wrongly shaped tensor is listed.
    """
    file = library.read_adapter(directory)
    layers = adapted_layers(model)
    if any(layer.merged for layer in layers.values()):
        raise RuntimeError("load_adapter: the model is merged; call unmerge(model) first")
    state = ModelAdapters.of(model) if layers else ModelAdapters()
    prepared = None
    if name in state.names:
        layers = {path: m for path, m in layers.items() if name in m.adapter_names}
        adapters: _Adapters = {path: m.held_adapter(name) for path, m in layers.items()}
        whole = state.whole[name]
    else:
        prepared = prepare_adapter(model, state, name, *_plan(model, file))
        layers, adapters, whole = prepared.layers, prepared.adapters, prepared.copies
    slots = _slots(layers, adapters, whole)
    report = _check(model, directory, file, slots, adapters, strict)
    for key in slots.keys() & file.tensors.keys():
        slots[key].copy_(file.tensors[key])
    if prepared is not None:
        if not state.names:
            model.requires_grad_(False)
        install_adapter(model, state, name, prepared)
    activate_adapter(model, name)
    return report


def _slots(
    layers: Mapping[str, Adapted], adapters: _Adapters, whole: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """{PEFT's key: the tensor it stands for}, detached: active directions, and whole modules."""
    slots: dict[str, Tensor] = {}
    for path, adapter in adapters.items():
        if adapter.lora_E is not None:
            raise ValueError(f"{path} is an AdaLoRA layer; this function reads and writes LoRA")
        is_embedding = isinstance(layers[path], nn.Embedding)
        parts = (
            (_Part.embedding_A, _Part.embedding_B) if is_embedding else (_Part.lora_A, _Part.lora_B)
        )
        slots[str(_Key(path, parts[0]))] = adapter.lora_A.detach()[: adapter.rank]
        slots[str(_Key(path, parts[1]))] = adapter.lora_B.detach()[:, : adapter.rank]
    for path, module in whole.items():
        for key, tensor in module.state_dict().items():
            owner, _, parameter = f"{path}.{key}".rpartition(".")
            slots[str(_Key(owner, _Part.saved, parameter))] = tensor
    return slots


def _config(model: nn.Module, layers: Mapping[str, Adapted], adapters: _Adapters):
    """What the adapter_config.json of these adapters says."""
    if not adapters:
        raise ValueError("save_adapter: every layer has rank 0; there is nothing to save")
    if len({a.options.rslora for a in adapters.values()}) > 1:
        raise ValueError("save_adapter: layers with and without rslora do not fit one PEFT folder")
    config = library.AdapterConfig()
    ranks = {path: adapter.rank for path, adapter in adapters.items()}
    alphas = {path: _alpha(adapter) for path, adapter in adapters.items()}
    config.rank, config.alpha = _most_common(ranks), _most_common(alphas)
    config.rank_pattern = [(p, r) for p, r in ranks.items() if r != config.rank]
    config.alpha_pattern = [(p, a) for p, a in alphas.items() if a != config.alpha]
    config.dropout = _most_common({p: a.options.dropout for p, a in adapters.items()})
    config.rslora = next(iter(adapters.values())).options.rslora
    config.fan_in_fan_out = any(
        layers[p].transposed and not isinstance(layers[p], nn.Embedding) for p in adapters
    )
    config.target_modules = _short_names(model, adapters)
    config.base_model_name_or_path = getattr(model, "name_or_path", "") or ""
    return config


def _alpha(adapter: HeldAdapter | StoredAdapter) -> float:
    """The alpha that gives the layer's scaling at its present rank."""
    options = adapter.options
    if adapter.rank == options.rank:
        return options.alpha
    return options.scaling * (math.sqrt(adapter.rank) if options.rslora else adapter.rank)


def _most_common(values: Mapping[str, float]):
    return Counter(values.values()).most_common(1)[0][0]


def _short_names(model: nn.Module, targets: Mapping[str, object]) -> list[str]:
    """Last name parts where they mean targets alone, whole names for the others."""
    names = [name for own in module_paths(model).values() for name in own]
    short = {path.rpartition(".")[2] for path in targets}
    clear = {s for s in short if all(n in targets for n in names if has_suffix(n, s))}
    return sorted({s if (s := path.rpartition(".")[2]) in clear else path for path in targets})


def _plan(model: nn.Module, file) -> tuple[dict[str, AdapterOptions], list[str]]:
    """The adapter that a file describes, over the modules that the model has."""
    options = {}
    modules = dict(model.named_modules())
    for key, tensor in file.tensors.items():
        parsed = library.parse_adapter_key(key)
        if parsed is None or parsed.part not in (_Part.lora_A, _Part.embedding_A):
            continue
        base = modules.get(parsed.module)
        kind = nn.Embedding if parsed.part == _Part.embedding_A else nn.Module
        if not isinstance(base, kind) or not (is_adaptable(base) or isinstance(base, Adapted)):
            continue  # _check() reports it
        options[parsed.module] = AdapterOptions(
            rank=tensor.shape[0],
            alpha=file.config.alpha_of(parsed.module),
            dropout=file.config.dropout,
            rslora=file.config.rslora,
            adapter_dtype=_factor_dtype(tensor.dtype, base.weight.dtype),
        )
    matching = [w for w in file.config.modules_to_save if any(has_suffix(n, w) for n in modules)]
    return options, list(find_whole(model, matching))


def _factor_dtype(stored: torch.dtype, base: torch.dtype) -> torch.dtype | None:
    """The dtype that the op takes over `base` and that holds `stored` unrounded; None for none."""
    masters = [torch.float32] if base in (torch.bfloat16, torch.float16) else []
    fitting = [d for d in [base, *masters] if torch.promote_types(stored, d) == d]
    return fitting[0] if fitting else None


def _check(
    model: nn.Module,
    directory: str | os.PathLike,
    file,
    slots: Mapping[str, Tensor],
    adapters: _Adapters,
    strict: bool,
) -> LoadReport:
    """Raises FileError with everything that does not fit."""
    report = LoadReport(
        sorted(slots.keys() - file.tensors.keys()), sorted(file.tensors.keys() - slots.keys())
    )
    problems = []
    for key in sorted(slots.keys() & file.tensors.keys()):
        wanted, got = slots[key], file.tensors[key]
        if wanted.shape != got.shape:
            problems.append(f"{key}: must be {list(wanted.shape)}, got {list(got.shape)}")
        elif torch.promote_types(wanted.dtype, got.dtype) != wanted.dtype:
            problems.append(f"{key}: {got.dtype} would be rounded to the model's {wanted.dtype}")
        elif wanted.dtype != got.dtype:
            warnings.warn(
                f"load_adapter: {key} is {got.dtype} and becomes {wanted.dtype}", stacklevel=3
            )
    for path, adapter in adapters.items():
        stored = file.config.scaling(path)
        if stored != adapter.options.scaling:
            problems.append(f"{path}: scaling must be {adapter.options.scaling:g}, got {stored:g}")
    if strict:
        problems += [f"{key}: missing in the file" for key in report.missing]
        problems += [f"{key}: {_why_unexpected(model, key)}" for key in report.unexpected]
    if problems:
        lines = "\n  ".join(problems)
        raise FileError(f"load_adapter: {os.fspath(directory)} does not fit the model:\n  {lines}")
    return report


def _why_unexpected(model: nn.Module, key: str) -> str:
    parsed = library.parse_adapter_key(key)
    if parsed is None:
        return "not a LoRA tensor"
    modules = dict(model.named_modules())
    if parsed.module in modules:
        kind = type(modules[parsed.module]).__name__
        return f"the model's {parsed.module} is a {kind} without a place for it"
    close = difflib.get_close_matches(parsed.module, modules, n=1)
    hint = f"; the nearest is {close[0]!r}" if close else ""
    return f"the model has no module {parsed.module!r}{hint}"
