"""Modules trained whole beside the adapters (modules_to_save), such as a classifier."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from .targets import check_ties, near_misses, parameter_users
from .tree import AdaptedLayer, Tree, enclosing

# adapter -> {module name: its own trained copy}; under None the base's originals.
WholeModules = dict[str | None, dict[str, nn.Module]]


def check_apart(
    tree: Tree, whole: WholeModules, targets: Iterable[str], wanted: Iterable[str]
) -> None:
    """A module trained whole for one adapter cannot hold another's layers: refuses by name."""
    for path in targets:
        top = enclosing(path, whole[None])
        if top is not None:
            raise ValueError(
                f"target_modules: {path!r} is in {top!r}, which another adapter trains whole"
            )
    for top in wanted:
        if any(isinstance(module, AdaptedLayer) for module in tree.modules[top].modules()):
            raise ValueError(f"modules_to_save: {top!r} holds the layers of another adapter")


def find_whole(tree: Tree, names: Iterable[str]) -> dict[str, nn.Module]:
    """{first name: module} of the modules to train whole; what is in one of them is part of it."""
    found: dict[str, nn.Module] = {}
    for wanted in map(tree.plain_name, names):
        if wanted not in tree.endings:
            raise ValueError(
                f"modules_to_save: {wanted!r} matches no module"
                + near_misses(wanted, filter(None, tree.modules))
            )
        found.update({tree.names[module][0]: module for module in tree.endings[wanted]})
    return {n: m for n, m in found.items() if enclosing(n.rpartition(".")[0], found) is None}


def check_owners(tree: Tree, whole: Mapping[str, nn.Module]) -> None:
    """Refuses modules with a tied weight of an earlier module's, but together with that.

    The first module that uses a weight owns it: transformers' tie_weights() gives it to the others.
    """
    users = parameter_users(tree) if whole else {}
    order = {module: place for place, module in enumerate(tree.names)}
    together = {part for module in whole.values() for part in module.modules()}
    for name, module in whole.items():
        for part in module.modules():
            tied = [user for p in part._parameters.values() for user, _ in users.get(id(p), ())]
            later = {user for user in tied if order[user] > order.get(part, -1)}
            check_ties("modules_to_save", name, part, users, together | later)


def parts_of_whole(whole: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """{name in the model: module} of modules trained whole and all that is in them."""
    return {
        f"{top}.{name}".removesuffix("."): part
        for top, module in whole.items()
        for name, part in Tree(module).modules.items()
    }


def use_whole(model: nn.Module, whole: WholeModules, name: str | None) -> None:
    """Puts the adapter's own copies of whole modules in place, and the originals elsewhere."""
    if not whole[None]:
        return
    tree = Tree(model)
    for path, original in whole[None].items():
        chosen = whole.get(name, {}).get(path, original)
        current = tree.modules[path]
        if chosen is current:
            continue
        _follow(chosen, current)
        chosen.requires_grad_(chosen is not original)
        tree.replace(current, chosen)


def _follow(module: nn.Module, current: nn.Module) -> None:
    """Gives a module that was not in place the devices, dtypes and modes of its twin that was."""
    for mine, twin in zip(module.parameters(), current.parameters(), strict=True):
        mine.data = mine.data.to(twin.device, twin.dtype)
    for mine, twin in zip(module.modules(), current.modules(), strict=True):
        mine.training = twin.training
        for name, buffer in mine._buffers.items():
            if buffer is not None:
                mine._buffers[name] = buffer.to(twin._buffers[name])
