"""Which modules of a model are trained whole beside the adapters (modules_to_save)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from torch import nn

from .targets import check_ties, near_misses, parameter_users
from .tree import AdaptedLayer, Tree, enclosing

# adapter -> {module name: its own}; under None the base's.
WholeModules = dict[str | None, dict[str, nn.Module]]


def check_apart(
    tree: Tree, tops: Collection[str], targets: Iterable[str], wanted: Collection[str]
) -> None:
    """What one adapter trains whole cannot hold what is another's: refuses by name.

    Args:
        tops: names of what other adapters train whole.
        targets, wanted: of the new adapter: its layers, and what it trains whole.
    """
    for path in targets:
        top = enclosing(path, tops)
        if top is not None:
            raise ValueError(
                f"target_modules: {path!r} is in {top!r}, which another adapter trains whole"
            )
    for names, others in ((wanted, tops), (tops, wanted)):
        for name in names:
            top = enclosing(name.rpartition(".")[0], others)
            if top is not None:
                raise ValueError(
                    f"modules_to_save: {name!r} is in {top!r}, and two adapters cannot train one "
                    "of them each"
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
