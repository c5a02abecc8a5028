"""The tree of a model's modules: their names, the adapted ones, and putting one in a place."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from .wrappers import key_inside, put_inside, unwrapped, without_wrappers

if TYPE_CHECKING:
    from .adapted import Adapted


class AdaptedLayer:
    """What adapted layers are recognised by; all else of them is in adapted.Adapted."""


def adapted_layers(model: nn.Module) -> dict[str, Adapted]:
    """{name: layer} of the adapted layers, each once."""
    return Tree(model).adapted


def required_layers(model: nn.Module) -> dict[str, Adapted]:
    """adapted_layers().

    Raises:
        ValueError: there are none.
    """
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("the model has no adapters: call apply_lora(model, config) first")
    return layers


class Tree:
    """A model's modules and their names, as one walk finds them.

    The names are those of the plain model: what stands in wrappers has the name of the outermost,
    and wrappers are no modules here. What is inside of adapted layers is left out: adapters' names
    are no modules' names.

    Attributes:
        model: whose modules these are, without wrappers; itself among them under the name "".
        wrapped: whether there are wrappers in the model.
        modules: {name: module}, in the model's order; a module used at two places has two names.
        names: {module: its names}.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = unwrapped(model)
        self.wrapped = False
        self.modules: dict[str, nn.Module] = {}
        self.names: dict[nn.Module, list[str]] = {}
        self._places: dict[nn.Module, list[Place]] = {}
        self._walk(self.model, "", ())

    def _walk(
        self, module: nn.Module, name: str, encoders: tuple[nn.TransformerEncoder, ...]
    ) -> None:
        self.modules[name] = module
        self.names.setdefault(module, []).append(name)
        if isinstance(module, AdaptedLayer):
            return
        if isinstance(module, nn.TransformerEncoder):
            encoders = (*encoders, module)
        for key, child in module._modules.items():
            if child is not None:
                place = Place(module, key, encoders)
                while (inner_key := key_inside(child)) is not None:
                    self.wrapped = True
                    place = Place(child, inner_key, encoders)
                    child = child._modules[inner_key]
                self._places.setdefault(child, []).append(place)
                self._walk(child, f"{name}.{key}" if name else key, encoders)

    @property
    def adapted(self) -> dict[str, Adapted]:
        """{first name: layer} of the adapted layers."""
        return {own[0]: m for m, own in self.names.items() if isinstance(m, AdaptedLayer)}

    @cached_property
    def endings(self) -> dict[str, list[nn.Module]]:
        """{a name or its last dotted parts: the modules that have it}, some of them twice."""
        found: dict[str, list[nn.Module]] = {}
        for name, module in self.modules.items():
            for ending in endings_of(name):
                found.setdefault(ending, []).append(module)
        return found

    def plain_name(self, name: str) -> str:
        """A name or ending without the parts of wrappers, where the model has it so alone."""
        plain = without_wrappers(name)
        known = plain and plain in self.endings and name not in self.endings
        return plain if known else name

    def replace(self, module: nn.Module, other: nn.Module) -> None:
        """Puts `other` in all places of `module`; the tree goes on to name what it found."""
        for parent, key, encoders in self._places[module]:
            put_inside(parent, key, other)
            for encoder in encoders:
                _leave_nested_tensors(encoder)


class Place(NamedTuple):
    """Where a module is: under a key of its parent, and inside of these encoders."""

    parent: nn.Module
    key: str
    encoders: tuple[nn.TransformerEncoder, ...]


def _leave_nested_tensors(encoder: nn.TransformerEncoder) -> None:
    """Only its layers' fast path can take them. What was set before is noted in the encoder."""
    vars(encoder).setdefault("_use_nested_tensor_before", encoder.use_nested_tensor)
    encoder.use_nested_tensor = False


def restore_nested_tensors(model: nn.Module) -> None:
    """Lets encoders without adapted layers use nested tensors as before they had any."""
    for module in model.modules():
        if "_use_nested_tensor_before" in vars(module) and not adapted_layers(module):
            module.use_nested_tensor = vars(module).pop("_use_nested_tensor_before")


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's own tensors as state_dict() names them in the plain module, without wrappers'."""
    tree = Tree(module)
    if not tree.wrapped:
        return module.state_dict(keep_vars=True)
    state: dict[str, Tensor] = {}
    for name, part in tree.modules.items():
        part._save_to_state_dict(state, f"{name}." if name else "", keep_vars=True)
    return state


def endings_of(name: str) -> list[str]:
    """The name, and all that is left of it after a dot, the longest first."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def enclosing(name: str, tops: Collection[str]) -> str | None:
    """The outermost of `tops` (a set, to be quick) that is the module or holds it, or None."""
    parts = name.split(".")
    return next((top for i in range(len(parts)) if (top := ".".join(parts[: i + 1])) in tops), None)
