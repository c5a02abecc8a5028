"""Adapters for whole models: apply, add, activate, delete, disable."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

from torch import nn

from .adapted import Adapted
from .base_parameters import check_not_sharded
from .config import TargetConfig
from .first_values import FirstValues
from .installed import Installed, forget_installed
from .model_adapters import ModelAdapters
from .prepared import install_adapter, plan, prepare_adapter
from .sharding import reshard
from .tree import Tree


def apply_lora(
    model: nn.Module,
    config: TargetConfig,
    name: str = "default",
    first_values: FirstValues | None = None,
) -> nn.Module:
    """Puts adapted layers in the place of a model's linear and embedding layers, in place.

    Every other parameter is frozen but those of `config.modules_to_save`, which are copied and
    trained whole. Parameters are shared, never copied. Of modules with a tied weight, such as an
    embedding and the output layer, all that are named train one copy; the others keep the base's.

    Args:
        model: any nn.Module that contains (not is) the layers to adapt; it may be compiled or in
            other wrappers, in whole or in part: names are always those of the plain model.
        config: what and where: a LoRAConfig or an AdaLoRAConfig.
        name: of the adapter; more are added with add_adapter().
        first_values: PiSSA(), OLoRA(), LoRAGA(...) or EVA(...) in the place of random directions.
            The model still computes what it did, and its parameters are not written.

    Returns:
        The same model.

    Raises:
        ValueError: no such targets (near misses are listed), tied weights, adapters already, or
            layers that the first values are not for; nothing is changed.
    """
    tree = Tree(model)
    if tree.adapted:
        raise ValueError("apply_lora: the model has adapters already; use add_adapter()")
    reshard(model)
    forget_installed(tree)
    state = ModelAdapters(tree)
    prepared = prepare_adapter(state, name, *plan(tree, config), first_values)
    install_adapter(state, name, prepared)
    model.requires_grad_(False)
    activate_adapter(model, name)
    return model


def add_adapter(
    model: nn.Module, name: str, config: TargetConfig, first_values: FirstValues | None = None
) -> None:
    """Adds an adapter, not active, over the same base, with targets and first values of its own."""
    reshard(model)
    state = ModelAdapters.of(model)
    with disable_adapters(model) if first_values is not None else nullcontext():
        prepared = prepare_adapter(state, name, *plan(state.tree, config), first_values)
    install_adapter(state, name, prepared)


def activate_adapter(model: nn.Module, name: str | None) -> None:
    """Switches to another adapter, or with None to the base alone; the base is not written.

    The active adapter's parameters require gradients, all others' do not.
    """
    state = ModelAdapters.of(model)
    if name is not None and name not in state.names:
        raise KeyError(f"activate_adapter: adapters are {state.names}, got {name!r}")
    reshard(model)
    if any(layer.merged for layer in state.layers.values()):
        raise RuntimeError("activate_adapter: the model is merged; call unmerge(model) first")
    check_switch(state.layers, name)
    state.whole_of(name)
    for layer in state.layers.values():
        layer.activate_adapter(name)
    state.activate(name)


def check_switch(layers: Mapping[str, Adapted], name: str | None) -> None:
    """Refuses, by name, factors that activate_adapter() cannot switch: sharded or computed."""
    for path, layer in layers.items():
        try:
            layer.check_switch(name)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def delete_adapter(model: nn.Module, name: str) -> None:
    """Forgets an adapter; if it was active, the model computes the base alone."""
    state = ModelAdapters.of(model)
    if name not in state.names:
        raise KeyError(f"delete_adapter: adapters are {state.names}, got {name!r}")
    active = {path: layer for path, layer in state.layers.items() if layer.adapter == name}
    if any(layer.merged for layer in active.values()):
        raise RuntimeError("delete_adapter: the model is merged; call unmerge(model) first")
    reshard(model)
    check_switch(active, None)
    for layer in state.layers.values():
        if name in layer.adapter_names:
            layer.delete_adapter(name)
    for place in state.places:
        place.adapter = None if place.adapter == name else place.adapter
    for own in state.installed.values():
        own.active = None if own.active == name else own.active
    state.stand()
    for place, paths in state.places.items():
        place.delete_adapter(state.tree, paths, name)
    for own in state.installed.values():
        own.places.pop(name, None)
        own.parameters.pop(name, None)


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters, in the order they were added."""
    return ModelAdapters.of(model).names


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model computes its base, merged or not; also modules trained whole."""
    state = ModelAdapters.of(model)
    check_not_sharded("disable_adapters", state.tree, state.whole, state.parameters, state.in_use)
    blocks = {Installed.at(state.tree), *state.installed.values()}
    before = {x: x.adapters_enabled for x in (*state.layers.values(), *state.places)}
    for own in blocks:
        own.disabled += 1
    for held in before:
        held.adapters_enabled = False
    state.stand()
    try:
        yield model
    finally:
        for own in blocks:
            own.disabled -= 1
        for held, enabled in before.items():
            held.adapters_enabled = enabled
        state = ModelAdapters(Tree(model))
        for held in {*state.layers.values(), *state.places} - before.keys():  # added in the block
            held.adapters_enabled = not state.disabled
        state.stand()
