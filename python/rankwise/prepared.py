"""An adapter made for a model: planned, prepared while nothing changes, and put in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .adapted import Adapted, StoredAdapter, check_adapter_name
from .base_parameters import Place, base_parameters, copies_of, tied_ends
from .config import AdapterOptions, TargetConfig
from .file_names import check_savable
from .first_values import FirstValues, find_first
from .installed import Installed
from .left_out import warn_of_left_out
from .model_adapters import ModelAdapters
from .nn import adapt
from .patterns import pattern_values
from .places import WholeCopy, WholePlace, note_place
from .quantised import keep_differentiable
from .targets import ALL_LINEAR, find_targets, named
from .tree import Tree
from .warned import warn
from .whole import check_apart, check_owners, find_whole

Plan = tuple[dict[str, AdapterOptions], dict[str, torch.dtype | None]]


def plan(tree: Tree, config: TargetConfig) -> Plan:
    """({layer: options}, {module trained whole: its dtype}) that a configuration means."""
    whole = find_whole(tree, config.modules_to_save)
    check_owners(tree, whole)
    check_savable(whole)
    targets = find_targets(tree, config, whole)
    if config.target_modules == ALL_LINEAR:
        known = named(tree, config.exclude_modules or ()) | set(whole.values())
        warn_of_left_out(tree, targets.values(), known)
    names = {path: tree.names[module] for path, module in targets.items()}

    def values(field: str) -> dict:
        patterns = {tree.plain_name(p): value for p, value in getattr(config, field).items()}
        return pattern_values(field, patterns, names)

    ranks, alphas = values("rank_pattern"), values("alpha_pattern")
    options = {path: config.options(ranks.get(path), alphas.get(path)) for path in names}
    return options, dict.fromkeys(whole, config.adapter_dtype)


@dataclass
class PreparedAdapter:
    """An adapter made for a model but not in it yet: nothing of the model has changed.

    Args:
        layers: layer name -> the adapted layer (new, or in the model already).
        adapters: layer name -> its adapter.
        whole: module name -> its place (new, or in the model already), without the adapter.
        copies: module name -> the adapter's own, trained whole.
        base, own: place -> the base's parameter and the adapter's own, where that is not copies'
            business alone: a tied weight, or one that a folder brings.
    """

    layers: dict[str, Adapted]
    adapters: dict[str, StoredAdapter]
    whole: dict[str, WholePlace]
    copies: dict[str, WholeCopy]
    base: dict[Place, nn.Parameter]
    own: dict[Place, nn.Parameter]


def prepare_adapter(
    state: ModelAdapters,
    name: str,
    options: dict[str, AdapterOptions],
    whole: dict[str, torch.dtype | None],
    first_values: FirstValues | None = None,
) -> PreparedAdapter:
    """Makes an adapter by plan; whatever can fail fails here."""
    tree = state.tree
    known = {path: place for place, paths in state.places.items() for path in paths}
    check_adapter_name("add_adapter", name)
    if name in state.names:
        raise ValueError(f"add_adapter: there is an adapter {name!r} already")
    if "" in options:
        raise ValueError("the model itself is a layer; use LoRALinear.from_linear(layer) instead")
    check_apart(tree, known, options, whole)
    layers = layers_of(tree, options)
    first = find_first(first_values, tree, layers, options)
    options = {path: found.options for path, found in first.items()} or options
    layers = {path: layers[path] for path in options}
    places = {path: known.get(path) or WholePlace(tree.modules[path]) for path in whole}
    originals = {path: place.original for path, place in places.items()}
    base = base_parameters(tree, state.whole, state.parameters)
    copies = copies_of(originals, state.parameters[None])
    ends = list(tied_ends(base, copies, layers))
    adapters = {path: _new_adapter(path, layer, options[path]) for path, layer in layers.items()}
    for path, found in first.items():
        adapters[path].begin(found.A, found.B)
    _warn_of_lower_ranks(options, adapters)
    trained = {path: place.new_copy(copies[path], whole[path]) for path, place in places.items()}
    for copied in trained.values():
        copied.widen()
    return PreparedAdapter(
        layers,
        adapters,
        places,
        trained,
        {place: parameter for place, parameter, _ in ends},
        {place: own for place, _, own in ends if own is not None},
    )


def layers_of(tree: Tree, options: dict[str, AdapterOptions]) -> dict[str, Adapted]:
    """{path: the adapted layer}, in the model already or to take the place of what is there."""
    return {path: _adapted(path, tree.modules[path], own) for path, own in options.items()}


def _adapted(path: str, module: nn.Module, options: AdapterOptions) -> Adapted:
    if isinstance(module, Adapted):
        return module
    try:
        return adapt(module, options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from error


def _new_adapter(path: str, layer: Adapted, options: AdapterOptions) -> StoredAdapter:
    try:
        return layer.new_adapter(options)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _warn_of_lower_ranks(
    options: dict[str, AdapterOptions], adapters: dict[str, StoredAdapter]
) -> None:
    lower = [
        f"'{path}' ({adapter.rank} in the place of {options[path].rank})"
        for path, adapter in adapters.items()
        if adapter.options.rank < options[path].rank
    ]
    if lower:
        warn(f"layers with a side smaller than the rank begin with that: {', '.join(lower)}")


def install_adapter(state: ModelAdapters, name: str, prepared: PreparedAdapter) -> None:
    """Puts a prepared adapter into the model, not active."""
    tree, enabled = state.tree, not state.disabled
    merged = any(layer.in_merged_model for layer in state.layers.values())
    for path, layer in prepared.layers.items():
        layer.adapters[name] = prepared.adapters[path]
        layer.adapters_enabled, layer.in_merged_model = enabled, merged
        tree.replace(tree.modules[path], layer)
        layer.take_place()
    keep_differentiable(tree.model)
    for path, place in prepared.whole.items():
        place.add_copy(name, prepared.copies[path])
        place.adapters_enabled = enabled
        for own_path in tree.names[tree.modules[path]]:
            note_place(tree, own_path, place)
    state.add_parameters(name, prepared.base, prepared.own)
    Installed.at(tree).places[name] = {**prepared.layers, **prepared.whole}
