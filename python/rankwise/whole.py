"""Modules trained whole beside the adapters (modules_to_save), such as a classifier."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from .targets import check_ties, has_suffix, near_misses
from .tree import AdaptedLayer, module_paths, replace_module

# adapter -> {module name: its own trained copy}; under None the base's originals.
WholeModules = dict[str | None, dict[str, nn.Module]]


def check_apart(
    model: nn.Module, whole: WholeModules, targets: Iterable[str], wanted: Iterable[str]
) -> None:
    """A module trained whole for one adapter cannot hold another's layers: refuses by name."""
    for path in targets:
        for top in whole[None]:
            if f"{path}.".startswith(f"{top}."):
                raise ValueError(
                    f"target_modules: {path!r} is in {top!r}, which another adapter trains whole"
                )
    for top in wanted:
        if any(isinstance(module, AdaptedLayer) for module in model.get_submodule(top).modules()):
            raise ValueError(f"modules_to_save: {top!r} holds the layers of another adapter")


def find_whole(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """{first name: module} of the modules to train whole."""
    found: dict[str, nn.Module] = {}
    paths = module_paths(model)
    for wanted in names:
        matches = [m for m, own in paths.items() if any(has_suffix(n, wanted) for n in own)]
        if not matches:
            every = [name for own in paths.values() for name in own if name]
            raise ValueError(
                f"modules_to_save: {wanted!r} matches no module" + near_misses(wanted, every)
            )
        found.update({paths[module][0]: module for module in matches})
    for name, module in found.items():
        inside = set(module.modules())
        for own in module.modules():
            check_ties("modules_to_save", name, own, paths, inside)
    return found


def use_whole(model: nn.Module, whole: WholeModules, name: str | None) -> None:
    """Puts the adapter's own copies of whole modules in place, and the originals elsewhere."""
    paths = module_paths(model)
    by_name = {place: module for module, places in paths.items() for place in places}
    for path, original in whole[None].items():
        chosen = whole.get(name, {}).get(path, original)
        current = by_name[path]
        if chosen is current:
            continue
        _follow(chosen, current)
        chosen.requires_grad_(chosen is not original)
        for place in paths[current]:
            replace_module(model, place, chosen)


def _follow(module: nn.Module, current: nn.Module) -> None:
    """Gives a module that was not in place the devices, dtypes and modes of its twin that was."""
    for mine, twin in zip(module.parameters(), current.parameters(), strict=True):
        mine.data = mine.data.to(twin)
    for mine, twin in zip(module.modules(), current.modules(), strict=True):
        mine.training = twin.training
        for name, buffer in mine._buffers.items():
            if buffer is not None:
                mine._buffers[name] = buffer.to(twin._buffers[name])
