"""What was put into a model by name: to notice what is no longer there."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from .places import WholePlace, note_place, place_at, whole_places
from .tree import AdaptedLayer, Tree

_INSTALLED = "_rankwise"


@dataclass(eq=False)
class Installed:
    """Kept as a plain attribute of the model that was given, copied and pickled with it.

    All else is in the tree, so that a part of the model, or a model around it, will do as well.

    Args:
        places: adapter -> {name: its layer, or the place of a module that it trains whole}.
        active: the adapter activated last.
        disabled: how many disable_adapters() blocks we are in.
        parameters: adapter -> {(name of a module, of a parameter in it): its own parameter there};
            under None the base's. See base_parameters.
    """

    places: dict[str, dict[str, AdaptedLayer | WholePlace]] = field(default_factory=dict)
    active: str | None = None
    disabled: int = 0
    parameters: dict[str | None, dict[tuple[str, str], nn.Parameter]] = field(
        default_factory=lambda: {None: {}}
    )

    @staticmethod
    def at(tree: Tree) -> Installed:
        """The model's own, made if it has none."""
        return vars(tree.model).setdefault(_INSTALLED, Installed())


def installed(tree: Tree) -> dict[str, Installed]:
    """{name: what was put into it} of the model and its parts."""
    found = {}
    for module, names in tree.names.items():
        if _INSTALLED in vars(module):
            found[names[0]] = vars(module)[_INSTALLED]
    return found


def forget_installed(tree: Tree) -> None:
    """Drops what is known of adapters, whose layers are no longer there."""
    for module in tree.names:
        vars(module).pop(_INSTALLED, None)
    for place, paths in whole_places(tree).items():
        place.copies.clear()
        for path in paths:
            note_place(tree, path, None)


def replaced(tree: Tree, adapter: str | None = None) -> dict[str, str]:
    """{name: the type that is there now} where the adapter, or the active one, no longer is."""
    present = {*tree.adapted.values(), *whole_places(tree)}
    found: dict[str, str] = {}
    for owner, own in installed(tree).items():
        name = own.active if adapter is None else adapter
        for path, held in own.places.get(name, {}).items():
            unloaded = getattr(held, "unloaded", False)
            if held not in present and name in held.adapter_names and not unloaded:
                kind = _replacement(tree, owner, path, name)
                if kind is not None:
                    found[f"{owner}.{path}".removeprefix(".")] = kind
    return found


def _replacement(tree: Tree, owner: str, path: str, adapter: str) -> str | None:
    """The type of what is in a place, or above it, without the adapter; None where all is well.

    All is well too where the place itself was taken out of the model: nothing is computed there.
    """
    full = f"{owner}.{path}".removeprefix(".")
    above, _, key = full.rpartition(".")
    place = place_at(tree.modules[above], key) if above in tree.modules else None
    name = full
    while name not in tree.modules:
        name, _, key = name.rpartition(".")
    module = tree.modules[name]
    if name != full:
        lists = isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
        if name == owner or lists or key in module._modules:
            return None
    layers = [inside for inside in module.modules() if isinstance(inside, AdaptedLayer)]
    holders = layers if place is None else [*layers, place]
    return None if any(adapter in x.adapter_names for x in holders) else type(module).__name__


def check_complete(operation: str, tree: Tree, adapter: str | None = None) -> None:
    """Raises ValueError that names what held the adapter, or the active one, and was replaced."""
    now = [f"{name!r} is a {kind} now" for name, kind in replaced(tree, adapter).items()]
    if now:
        raise ValueError(
            f"{operation}: what held the adapter was replaced: {', '.join(now)}; put back what "
            "was there, or delete_adapter() and add one over what is there now"
        )
