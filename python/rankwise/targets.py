"""Which modules of a model an adapter goes to: names, regular expressions, exclusions, ties."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Sequence
from functools import cache

from torch import nn

from .config import TargetConfig
from .nn import is_adaptable
from .quantised import OTHER_LIBRARIES
from .tree import AdaptedLayer, Tree, enclosing, endings_of
from .wrappers import unwrapped

ALL_LINEAR = "all-linear"


def compiled(field: str, pattern: str) -> re.Pattern:
    """A regular expression of the user's.

    Raises:
        ValueError: it is none.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{field}: {pattern!r} is no regular expression: {error}") from error


def named(tree: Tree, wanted: Sequence[str] | str) -> set[nn.Module]:
    """The modules that names, their last parts, or a regular expression for whole names mean."""
    if isinstance(wanted, str):
        matcher = compiled("exclude_modules", wanted)
        return {module for name, module in tree.modules.items() if matcher.fullmatch(name)}
    return {m for name in map(tree.plain_name, wanted) for m in tree.endings.get(name, ())}


def find_targets(
    tree: Tree, config: TargetConfig, whole: Collection[str] = ()
) -> dict[str, nn.Module]:
    """{first name: module} of the layers that get an adapter, in the model's order.

    What is inside of `whole`, modules trained whole, gets none.

    Raises:
        ValueError: a pattern matches nothing, or something that is no linear or embedding layer;
            a target's weight is tied to another module's.
    """
    chosen = _selected(tree, config.target_modules, "target_modules")
    excluded: set[nn.Module] = set()
    if config.exclude_modules:
        excluded = set(_selected(tree, config.exclude_modules, "exclude_modules"))
    tops = set(whole)
    targets = {
        tree.names[module][0]: module
        for module in chosen
        if module not in excluded
        and all(enclosing(name, tops) is None for name in tree.names[module])
    }
    _check_no_peft(tree, targets)
    for name, module in targets.items():
        if not (is_adaptable(module) or isinstance(module, AdaptedLayer)):
            raise ValueError(_not_adaptable("target_modules", name, module))
    if not targets:
        raise ValueError(f"target_modules: {config.target_modules!r} leaves no module to adapt")
    users = parameter_users(tree)
    for name, module in targets.items():
        check_ties("target_modules", name, module, users, {module})
    return targets


def _check_no_peft(tree: Tree, targets: Iterable[str]) -> None:
    """Refuses PEFT's layers and what is in them: an adapter on an adapter."""
    layers = {n for module, names in tree.names.items() if _of_peft(type(module)) for n in names}
    inside = [name for name in targets if enclosing(name, layers) is not None]
    if inside:
        raise ValueError(
            f"target_modules: {inside[0]!r} belongs to a layer of PEFT's, which has an adapter "
            "already; rankwise.integrations.peft.accelerate(model) runs that one on rankwise's "
            "operators"
        )


@cache
def _of_peft(kind: type) -> bool:
    return any(
        base.__name__ == "BaseTunerLayer" and base.__module__.startswith("peft.")
        for base in kind.__mro__
    )


def _selected(tree: Tree, wanted: Sequence[str] | str, field: str) -> list[nn.Module]:
    adaptable = [m for m in tree.names if is_adaptable(m) or isinstance(m, AdaptedLayer)]
    if wanted == ALL_LINEAR:
        output = getattr(tree.model, "get_output_embeddings", lambda: None)()
        left = None if output is None else unwrapped(output)
        return [m for m in adaptable if not isinstance(m, nn.Embedding) and m is not left]
    names = [name for module in adaptable for name in tree.names[module]]
    if isinstance(wanted, str):
        matcher = compiled(field, wanted)
        matches = [m for m in adaptable if any(matcher.fullmatch(n) for n in tree.names[m])]
        if not matches:
            for name in filter(matcher.fullmatch, tree.modules):
                raise ValueError(_not_adaptable(field, name, tree.modules[name]))
            raise ValueError(
                f"{field}: the regular expression {wanted!r} matches no whole name of a layer"
                + near_misses(wanted, names)
            )
        return matches
    found: set[nn.Module] = set()
    for ending in map(tree.plain_name, wanted):
        if ending not in tree.endings:
            raise ValueError(f"{field}: {ending!r} matches no module" + near_misses(ending, names))
        found.update(tree.endings[ending])
    return [module for module in tree.names if module in found]


def near_misses(wanted: str, names: Iterable[str]) -> str:
    """; the closest names and suffixes, or else the last parts that occur."""
    suffixes = {ending for name in names for ending in endings_of(name)}
    close = difflib.get_close_matches(wanted, sorted(suffixes), n=5, cutoff=0.6)
    if close:
        return f"; did you mean {', '.join(map(repr, close))}?"
    last = sorted({name.split(".")[-1] for name in names if name})
    return f"; names end in {', '.join(map(repr, last[:20]))}" if last else ""


def _not_adaptable(field: str, name: str, module: nn.Module) -> str:
    library = type(module).__module__.partition(".")[0]
    other = f" quantised by {library}" if library in OTHER_LIBRARIES else ""
    return (
        f"{field}: {name!r} is a {type(module).__name__}{other}, but adapters go to nn.Linear, "
        "nn.Embedding, transformers' Conv1D, and to linear layers quantised by bitsandbytes or "
        "torchao; exclude it with exclude_modules"
    )


def parameter_users(tree: Tree) -> dict[int, list[tuple[nn.Module, str]]]:
    """{id of a parameter: (module, its name in messages) of each that has it as its own}."""
    users: dict[int, list[tuple[nn.Module, str]]] = {}
    for module, names in tree.names.items():
        for key, parameter in module._parameters.items():
            name = names[0] if key == "weight" else f"{names[0]}.{key}".removeprefix(".")
            users.setdefault(id(parameter), []).append((module, name))
    return users


def check_ties(
    field: str,
    name: str,
    module: nn.Module,
    users: dict[int, list[tuple[nn.Module, str]]],
    inside: set[nn.Module],
) -> None:
    """Refuses a module whose parameters another one, not among `inside`, uses too."""
    others = [
        other_name
        for parameter in module._parameters.values()
        if parameter is not None
        for other, other_name in users.get(id(parameter), ())
        if other not in inside
    ]
    if others:
        raise ValueError(
            f"{field}: {name!r} has its weight tied to {', '.join(map(repr, others))}, so an "
            "adapter on one would untie them; exclude it or untie first"
        )
