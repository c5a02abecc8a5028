"""The tree of a model's modules: their names, the adapted ones, and putting one in a place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from .adapted import Adapted


class AdaptedLayer:
    """What adapted layers are recognised by; all else of them is in adapted.Adapted."""


def adapted_layers(model: nn.Module) -> dict[str, Adapted]:
    """{name: layer} of the adapted layers, each once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, AdaptedLayer)}


def required_layers(model: nn.Module) -> dict[str, Adapted]:
    """adapted_layers().

    Raises:
        ValueError: there are none.
    """
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("the model has no adapters: call apply_lora(model, config) first")
    return layers


def module_paths(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module with all its names; a module used at two places has two.

    What is inside of adapted layers is left out: adapters' names are no modules' names.
    """
    paths: dict[nn.Module, list[str]] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if inside and name.startswith(inside):
            continue
        paths.setdefault(module, []).append(name)
        if isinstance(module, AdaptedLayer):
            inside = (f"{name}." if name else "adapters",)
    return paths


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts `module` in the place `path`."""
    parent_path, _, attribute = path.rpartition(".")
    model.get_submodule(parent_path)._modules[attribute] = module
    for name, ancestor in model.named_modules():
        if isinstance(ancestor, nn.TransformerEncoder) and f"{path}.".startswith(name):
            ancestor.use_nested_tensor = False  # only its layers' fast path can take nested tensors
