"""Adapters in PEFT's folders: save, export and load, over the C++ file layer."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ._library import library
from .adapted import Adapted, HeldAdapter
from .base_parameters import base_parameters, untie_copies
from .devices import realise
from .file_base import brought_by, stored_copies, take_base
from .file_base_model import check_task, name_task
from .file_config import (
    Adapters,
    adapter_of,
    add_method,
    plain_file,
    plan_of,
    saved_beside,
    shared_config,
)
from .file_slots import Slot, factors_of, slots_of, write_folder
from .model import activate_adapter, check_switch
from .model_adapters import ModelAdapters
from .prepared import install_adapter, prepare_adapter
from .sharding import mesh_of, reshard, shared_outcome
from .tree import Tree
from .warned import warn

FileError = library.FileError
HINTS = 20  # tensors whose nearest module an error names: each is looked for among all modules


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike,
    name: str | None = None,
    task_type: str | None = None,
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Writes an adapter as PEFT's folder: adapter_config.json and adapter_model.safetensors.

    Of LoRA or of AdaLoRA, as the layers are. Atomic: a process killed at any moment leaves the
    folder's old adapter or the new one. All processes must save a model under fully_shard: they
    gather it, the first one writes and the others wait for it. LoRA layers of rank 0 are left out,
    for PEFT knows none and they compute their base. AdaLoRA's schedule is stored where it is known
    (see adalora_config); else the folder has a placeholder, for PEFT wants one: total_step 1 and
    target_r = init_r.

    Args:
        model: with adapters.
        directory: created if missing; stock PEFT reads it with PeftModel.from_pretrained.
        name: of the adapter; None for the active one.
        task_type: PEFT's name of the task, such as "CAUSAL_LM", for the folder's readers; None for
            that of the folder from which the adapter was loaded. Without one the folder names the
            class of a model with a name_or_path, so that PEFT's AutoPeftModel can make the base.
        beside: {name: content} of further files of the folder, which change together with these.

    Raises:
        ValueError: there is no such adapter or task, or PEFT's format cannot hold it: AdaLoRA's has
            one initial rank and one alpha for all layers, and no rslora. export_lora can.
        FileError: the folder cannot be written.
    """
    check_task("save_adapter", task_type)
    reshard(model)
    layers, adapters, whole = adapter_of("save_adapter", model, name)
    adapters = {p: a for p, a in adapters.items() if a.update_rank > 0 or a.options.triplets}
    if not adapters:
        raise ValueError("save_adapter: every layer has rank 0; there is nothing to save")
    config = shared_config(model, layers, adapters)
    name_task(config, model, task_type)
    add_method(config, adapters)
    config.modules_to_save = list(whole)
    slots = slots_of("save_adapter", layers, adapters, saved_beside(model, whole))
    slots |= brought_by("save_adapter", model, name, adapters)
    mesh = mesh_of(slot.tensor for slot in slots.values())
    tensors = {key: slot.value() for key, slot in slots.items()}
    write_folder(directory, library.AdapterFile(config, tensors, beside or {}), mesh)


def export_lora(
    model: nn.Module,
    directory: str | os.PathLike,
    name: str | None = None,
    task_type: str | None = None,
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Writes any adapter as a plain LoRA folder that PEFT, vLLM and llama.cpp read alike.

    One rank for all layers, the largest, reached with zeros; lora_alpha = r, so that the scale is
    1; no patterns. The scaling and lora_E go into lora_B: computed in float64, rounded once. Layers
    of rank 0 are left out. Modules trained whole are in the folder too, with a warning: PEFT reads
    them, vLLM and llama.cpp do not.

    Args:
        model, directory, name, task_type, beside: as save_adapter.

    Raises:
        ValueError: there is no such adapter or task, every layer has rank 0, or a value would not
            be finite in the adapter's dtype.
        FileError: the folder cannot be written.
    """
    check_task("export_lora", task_type)
    reshard(model)
    layers, adapters, whole = adapter_of("export_lora", model, name)
    adapters = {p: a for p, a in adapters.items() if a.update_rank > 0}
    if not adapters:
        raise ValueError("export_lora: every layer has rank 0; there is nothing to write")
    slots = slots_of("export_lora", layers, adapters, whole)
    mesh = mesh_of(slot.tensor for slot in slots.values())
    updates = [_update(path, a, layers[path]) for path, a in adapters.items()]
    config = shared_config(model, layers, adapters)
    name_task(config, model, task_type)
    config.modules_to_save = list(whole)
    folded = library.fold_adapter(updates, config)
    folded.config.target_modules = config.target_modules  # short names, where the model allows it
    saved = slots_of("export_lora", {}, {}, saved_beside(model, whole))
    saved |= brought_by("export_lora", model, name, adapters)
    tensors = folded.tensors | {key: slot.value() for key, slot in saved.items()}
    write_folder(directory, library.AdapterFile(folded.config, tensors, beside or {}), mesh)
    if whole:
        warn(
            f"export_lora: the folder has modules trained whole ({', '.join(whole)}), which PEFT "
            "reads; vLLM and llama.cpp's conversion stop there"
        )


def _update(path: str, adapter: HeldAdapter, layer: Adapted):
    A, B, *E = (slot.value() for slot in factors_of(adapter))
    embedding = isinstance(layer, nn.Embedding)
    return library.AdapterUpdate(path, A, B, *(E or [None]), adapter.options.scaling, embedding)


@dataclass(frozen=True)
class LoadReport:
    """What a load with strict=False left out, and what the folder has of the base.

    Args:
        missing: tensors of the model's adapter that the file lacks.
        unexpected: tensors of the file that have no place in the model.
        base: the base's tensors in the file that differ from the model's; the adapter uses its own.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    base: list[str] = field(default_factory=list)


def load_adapter(
    model: nn.Module, directory: str | os.PathLike, strict: bool = True, name: str = "default"
) -> LoadReport:
    """Reads a PEFT folder of LoRA or AdaLoRA into a model and activates the adapter.

    A model without an adapter of this name gets one with the file's ranks and options (of AdaLoRA
    with the initial rank as its capacity); otherwise the tensors go into the adapter that is there,
    which must be of the same method and have the same ranks and scalings, and which takes the
    file's schedule when it knows none (see adalora_config). The file's dtype is kept where the base
    allows it, widened with a warning where not, never rounded. Weights of the base in the folder,
    which PEFT stores of adapted or resized embeddings, take the place of the model's, also of those
    tied to them, while the adapter is active. Nothing is changed unless everything fits.

    Under fully_shard the adapter must be there and active, and all processes load, or none. On a
    model on the meta device the factors are real, on the CPU: they stay when the base's weights
    come, with load_state_dict(assign=True) or to_empty(); modules trained whole need them first.

    Args:
        model: plain or with adapters.
        directory: with adapter_config.json and adapter_model.safetensors.
        strict: every tensor must have its place and the reverse; else one of them must, and the
            report lists the rest.
        name: the adapter's name in the model.

    Raises:
        FileError: the folder cannot be read, is damaged, or does not fit the model: every missing,
            extra or wrongly shaped tensor is listed.
        TypeError: strict is no bool.
    """
    if not isinstance(strict, bool):
        raise TypeError(f"load_adapter: strict must be a bool, got {strict!r}; a name is name=...")
    reshard(model)
    tree = Tree(model)
    state = ModelAdapters(tree)
    layers = state.layers
    with shared_outcome(_mesh(layers, name)):
        file = plain_file(library.read_adapter(directory), tree)
        tensors = dict(file.tensors)
        if any(layer.merged for layer in layers.values()):
            raise RuntimeError("load_adapter: the model is merged; call unmerge(model) first")
        prepared = None
        if name in state.names:
            check_switch(layers, name)
            layers = {path: m for path, m in layers.items() if name in m.adapter_names}
            adapters: Adapters = {path: m.holder_of(name) for path, m in layers.items()}
            whole, own = state.whole_of(name), state.parameters.get(name, {})
        else:
            prepared = prepare_adapter(state, name, *plan_of(tree, file))
            layers, adapters, own = prepared.layers, prepared.adapters, prepared.own
            whole = {path: copied.module for path, copied in prepared.copies.items()}
            untie_copies(own, whole, stored_copies(own, tensors))
            settings = library.ModuleSettings(file.config)
            for path, adapter in adapters.items():
                adapter.keep_first(settings.rank_of(path))
        for path, adapter in adapters.items():
            if layers[path]._base_weight().is_meta:
                realise(layers[path], adapter, torch.device("cpu"))
        slots = slots_of("load_adapter", layers, adapters, whole)
        base = base_parameters(tree, state.whole, state.parameters)
        brought = take_base(tree, tensors, slots, base, own, whole)
        report = _check(tree, directory, file.config, tensors, slots, adapters, strict)
    for key in slots.keys() & tensors.keys():
        slots[key].fill(tensors[key])
    new = {id(parameter) for parameter in brought.values()}
    report.base.extend(k for k in sorted(tensors) if k in slots and id(slots[k].tensor) in new)
    if prepared is not None:
        if not state.names:
            model.requires_grad_(False)
        install_adapter(state, name, prepared)
    state.add_parameters(name, {place: base[place] for place in brought}, brought)
    activate_adapter(model, name)
    for layer in layers.values():
        if layer.lora_E is not None and layer.options.allocation is None:
            layer.options = replace(layer.options, allocation=file.config.allocation)
    return report


def _mesh(layers: Mapping[str, Adapted], name: str):
    """The processes that the factors of the adapter of this name are sharded over, or None."""
    held = [m.held_adapter(name) for m in layers.values() if name in m.adapter_names]
    return mesh_of(slot.tensor for adapter in held for slot in factors_of(adapter))


def _check(
    tree: Tree,
    directory: str | os.PathLike,
    config,
    tensors: Mapping[str, Tensor],
    slots: Mapping[str, Slot],
    adapters: Adapters,
    strict: bool,
) -> LoadReport:
    """Raises FileError with everything that does not fit."""
    settings = library.ModuleSettings(config)
    report = LoadReport(
        sorted(slots.keys() - tensors.keys()), sorted(tensors.keys() - slots.keys())
    )
    problems = []
    first: dict[int, str] = {}
    for key in sorted(slots.keys() & tensors.keys()):
        wanted, got = slots[key], tensors[key]
        twin = first.setdefault(id(wanted.tensor), key)
        if twin != key and not torch.equal(tensors[twin], got):
            problems.append(f"{key}: differs from {twin}, to which it is tied in the model")
        if wanted.why_not_filled:
            problems.append(f"{key}: the model's {wanted.why_not_filled}")
        elif wanted.shape != list(got.shape):
            resized = wanted.rank is None and wanted.shape[1:] == list(got.shape[1:])
            way = "; resize the model's vocabulary first (resize_token_embeddings)" * resized
            problems.append(f"{key}: must be {wanted.shape}, got {list(got.shape)}{way}")
        elif torch.promote_types(wanted.dtype, got.dtype) != wanted.dtype:
            problems.append(f"{key}: {got.dtype} would be rounded to the model's {wanted.dtype}")
        elif wanted.dtype != got.dtype:
            warn(f"load_adapter: {key} is {got.dtype} and becomes {wanted.dtype}")
    for path, adapter in adapters.items():
        stored = settings.scaling(path)
        if not math.isclose(stored, adapter.options.scaling):  # AdaLoRA's is stored rounded
            problems.append(f"{path}: scaling must be {adapter.options.scaling:g}, got {stored:g}")
    if strict or len(report.unexpected) == len(tensors):  # nothing fits
        problems += [f"{key}: missing in the file" for key in report.missing]
        problems += [
            f"{key}: {_why_unexpected(tree, key, hint=place < HINTS)}"
            for place, key in enumerate(report.unexpected)
        ]
    if problems:
        lines = "\n  ".join(problems)
        raise FileError(f"load_adapter: {os.fspath(directory)} does not fit the model:\n  {lines}")
    return report


def _why_unexpected(tree: Tree, key: str, hint: bool) -> str:
    parsed = library.parse_adapter_key(key)
    if parsed is None:
        return "not a LoRA tensor"
    if parsed.module in tree.modules:
        kind = type(tree.modules[parsed.module]).__name__
        return f"the model's {parsed.module} is a {kind} without a place for it"
    close = difflib.get_close_matches(parsed.module, tree.modules, n=1) if hint else []
    nearest = f"; the nearest is {close[0]!r}" if close else ""
    return f"the model has no module {parsed.module!r}{nearest}"
