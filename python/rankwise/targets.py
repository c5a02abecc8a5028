"""Which modules of a model an adapter goes to: names, regular expressions, exclusions, ties."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import nn

from .config import TargetConfig
from .nn import is_adaptable
from .tree import AdaptedLayer, module_paths

ALL_LINEAR = "all-linear"


def has_suffix(name: str, suffix: str) -> bool:
    """Whether `suffix` is the name or its last dotted parts."""
    return name == suffix or name.endswith("." + suffix)


def lookup(patterns: Mapping, names: Iterable[str]):
    """The value of the first pattern that fits one of a module's names, or None.

    A pattern is a name, a dotted suffix, or a regular expression for one of these.
    """
    for pattern, value in patterns.items():
        matcher = _compiled("pattern", rf"(.*\.)?({pattern})")
        if any(matcher.fullmatch(name) for name in names):
            return value
    return None


def _compiled(field: str, pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{field}: {pattern!r} is no regular expression: {error}") from error


def find_targets(
    model: nn.Module, config: TargetConfig, whole: Collection[str] = ()
) -> dict[str, nn.Module]:
    """{first name: module} of the layers that get an adapter, in the model's order.

    What is inside of `whole`, modules trained whole, gets none.

    Raises:
        ValueError: a pattern matches nothing, or something that is no linear or embedding layer;
            a target's weight is tied to another module's.
    """
    paths = module_paths(model)
    chosen = _selected(model, paths, config.target_modules, "target_modules")
    if config.exclude_modules:
        excluded = _selected(model, paths, config.exclude_modules, "exclude_modules")
        chosen = [module for module in chosen if module not in set(excluded)]
    chosen = [
        module
        for module in chosen
        if not any(f"{name}.".startswith(f"{top}.") for name in paths[module] for top in whole)
    ]
    targets = {paths[module][0]: module for module in chosen}
    for name, module in targets.items():
        if not (is_adaptable(module) or isinstance(module, AdaptedLayer)):
            raise ValueError(_not_adaptable("target_modules", name, module))
    if not targets:
        raise ValueError(f"target_modules: {config.target_modules!r} leaves no module to adapt")
    for name, module in targets.items():
        check_ties("target_modules", name, module, paths, {module})
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field):
            _compiled(field, pattern)
            if all(lookup({pattern: True}, paths[m]) is None for m in targets.values()):
                raise ValueError(
                    f"{field}: {pattern!r} matches none of the {len(targets)} targets"
                    + near_misses(pattern, targets)
                )
    return targets


def _selected(
    model: nn.Module, paths: dict[nn.Module, list[str]], wanted: Sequence[str] | str, field: str
) -> list[nn.Module]:
    adaptable = [m for m in paths if is_adaptable(m) or isinstance(m, AdaptedLayer)]
    names = [name for module in adaptable for name in paths[module]]
    if wanted == ALL_LINEAR:
        output = getattr(model, "get_output_embeddings", lambda: None)()
        return [m for m in adaptable if not isinstance(m, nn.Embedding) and m is not output]
    if isinstance(wanted, str):
        matcher = _compiled(field, wanted)
        matches = [m for m in adaptable if any(matcher.fullmatch(n) for n in paths[m])]
        if not matches:
            for module, own in paths.items():
                for name in filter(matcher.fullmatch, own):
                    raise ValueError(_not_adaptable(field, name, module))
            raise ValueError(
                f"{field}: the regular expression {wanted!r} matches no whole name of a layer"
                + near_misses(wanted, names)
            )
        return matches
    matches = []
    for suffix in wanted:
        found = [m for m, own in paths.items() if any(has_suffix(n, suffix) for n in own)]
        if not found:
            raise ValueError(f"{field}: {suffix!r} matches no module" + near_misses(suffix, names))
        matches.extend(found)
    return [module for module in paths if module in set(matches)]


def near_misses(wanted: str, names: Iterable[str]) -> str:
    """; the closest names and suffixes, or else the last parts that occur."""
    suffixes = {".".join(n.split(".")[i:]) for n in names for i in range(n.count(".") + 1)}
    close = difflib.get_close_matches(wanted, sorted(suffixes), n=5, cutoff=0.6)
    if close:
        return f"; did you mean {', '.join(map(repr, close))}?"
    last = sorted({name.split(".")[-1] for name in names if name})
    return f"; names end in {', '.join(map(repr, last[:20]))}" if last else ""


def _not_adaptable(field: str, name: str, module: nn.Module) -> str:
    return (
        f"{field}: {name!r} is a {type(module).__name__}, but adapters go to nn.Linear, "
        "nn.Embedding and transformers' Conv1D; exclude it with exclude_modules"
    )


def check_ties(
    field: str,
    name: str,
    module: nn.Module,
    paths: dict[nn.Module, list[str]],
    inside: set[nn.Module],
) -> None:
    """Refuses a module whose parameters another one, not among `inside`, uses too."""
    parameters = {id(p) for p in module._parameters.values() if p is not None}
    others = [
        own[0] if key == "weight" else f"{own[0]}.{key}".removeprefix(".")
        for other, own in paths.items()
        for key, parameter in other._parameters.items()
        if other not in inside and id(parameter) in parameters
    ]
    if others:
        raise ValueError(
            f"{field}: {name!r} has its weight tied to {', '.join(map(repr, others))}, so an "
            "adapter on one would untie them; exclude it or untie first"
        )
