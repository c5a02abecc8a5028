"""Plain models again: without adapters, merged or not."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from .adapted import Adapted
from .installed import forget_installed
from .masters import make_plain
from .model_adapters import ModelAdapters
from .sharding import check_not_flat, reshard
from .tree import Tree, required_layers, restore_nested_tensors


def unload(model: nn.Module) -> nn.Module:
    """Puts plain layers in the place of all adapted ones, in place; all adapters are dropped.

    The weights are what they are now: with the active adapter's update where the model is merged,
    and then its modules trained whole stay too; else the base's. Parameters are the same objects,
    hooks and their handles go on working, and ``requires_grad`` stays as it is: the base is frozen
    until ``model.requires_grad_(True)``. Nothing of this library is left in the model.

    Args:
        model: with adapters, merged or not.

    Returns:
        The same model.

    Raises:
        ValueError: the model has no adapters, is itself an adapted layer, or is sharded.
        RuntimeError: some layers are merged and others not, the adapters are disabled, or a layer
            cannot be unloaded (see its unload()); nothing is changed.
    """
    reshard(model)
    check_not_flat("unload", model)
    layers = required_layers(model)
    state = ModelAdapters(Tree(model))
    _check(layers)
    if state.disabled:
        raise RuntimeError("unload: the adapters are disabled; leave disable_adapters() first")
    if not any(layer.merged for layer in layers.values()):
        state.activate(None)
    for place in state.places:
        make_plain(place.module)
    tree = Tree(model)
    forget_installed(tree)
    for layer in layers.values():
        tree.replace(layer, layer.unload())
    restore_nested_tensors(model)
    return model


def _check(layers: Mapping[str, Adapted]) -> None:
    if "" in layers:
        raise ValueError(
            "unload: the model itself is an adapted layer, and nothing holds it that could hold a "
            "plain one; use plain = layer.unload()"
        )
    active = {name: layer.merged for name, layer in layers.items() if layer.adapter is not None}
    if len(set(active.values())) > 1:
        merged, other = (next(n for n, m in active.items() if m is x) for x in (True, False))
        raise RuntimeError(
            f"unload: {merged!r} is merged and {other!r} is not; call merge(model) or "
            "unmerge(model) first"
        )
    for name, layer in layers.items():
        try:
            layer.check_unload()
        except (RuntimeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
