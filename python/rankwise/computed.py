"""Parameters that something else computes: torch's parametrizations, and its older hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

# Hooks that compute a tensor before each forward, and what removes them.
_REMOVERS: dict[type, str] = {
    WeightNorm: "torch.nn.utils.remove_weight_norm",
    SpectralNorm: "torch.nn.utils.remove_spectral_norm",
    BasePruningMethod: "torch.nn.utils.prune.remove",
}


def _computing_hooks(module: nn.Module) -> Iterator[tuple[str, Callable]]:
    """(tensor's name, hook)"""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, tuple(_REMOVERS)):
            yield getattr(hook, "name", None) or hook._tensor_name, hook


def not_a_parameter(module: nn.Module, name: str) -> str | None:
    """None where `name` is a parameter of the module's own; else what it is, and the way out."""
    if module._parameters.get(name) is not None:
        return None
    if parametrize.is_parametrized(module, name):
        kinds = ", ".join(type(p).__name__.lstrip("_") for p in module.parametrizations[name])
        remove = "torch.nn.utils.parametrize.remove_parametrizations"
        return f"{name} is parametrised ({kinds}); call {remove}(layer, {name!r}) first"
    for computed, hook in _computing_hooks(module):
        if computed == name:
            remove = next(r for kind, r in _REMOVERS.items() if isinstance(hook, kind))
            kind = type(hook).__name__
            return f"{name} is computed in forward ({kind}); call {remove}(layer, {name!r}) first"
    if not hasattr(module, name):
        return f"{name} is missing; give the layer an nn.Parameter of that name first"
    kind = type(getattr(module, name)).__name__  # what removing a frozen weight_norm leaves
    way_out = f"layer.{name} = torch.nn.Parameter(layer.{name}, requires_grad=False)"
    return f"{name} is a plain {kind}, not a parameter; set {way_out} first"


def tensors_of(module: nn.Module, *names: str) -> list[Tensor | None]:
    """Of these names, computed or not, for code that each call runs.

    By the dictionary of parameters: an attribute that is asked for takes ten times as long.
    """
    own = module._parameters
    return [own[name] if name in own else getattr(module, name) for name in names]


def compute_anew(module: nn.Module) -> None:
    """Runs the hooks that compute tensors, which are as old as the last forward."""
    for name, hook in _computing_hooks(module):
        if isinstance(hook, SpectralNorm):  # the hook itself would change its buffers in training
            setattr(module, name, hook.compute_weight(module, do_power_iteration=False))
        else:
            hook(module, ())
