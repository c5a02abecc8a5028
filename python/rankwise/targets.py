"""Which modules of a model an adapter goes to: names, regular expressions, exclusions, ties."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from torch import nn

from .adapted import Adapted
from .config import LoRAConfig
from .nn import is_adaptable

ALL_LINEAR = "all-linear"


def module_paths(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module with all its names; a module used at two places has two."""
    paths: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(name)
    return paths


def has_suffix(name: str, suffix: str) -> bool:
    """Whether `suffix` is the name or its last dotted parts."""
    return name == suffix or name.endswith("." + suffix)


def lookup(patterns: dict, name: str):
    """The value of the first pattern (name, suffix or regular expression) that fits, or None."""
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return value
    return None


def find_targets(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """{first name: module} of the layers that get an adapter, in the model's order.

    Raises:
        ValueError: a pattern matches nothing, or something that is no linear or embedding layer;
            a target's weight is tied to another module's.
    """
    paths = module_paths(model)
    chosen = _selected(model, paths, config.target_modules, "target_modules")
    if config.exclude_modules:
        excluded = _selected(model, paths, config.exclude_modules, "exclude_modules")
        chosen = [module for module in chosen if module not in set(excluded)]
    whole = find_whole(model, config.modules_to_save)
    chosen = [
        module
        for module in chosen
        if not any(f"{name}.".startswith(f"{top}.") for name in paths[module] for top in whole)
    ]
    targets = {paths[module][0]: module for module in chosen}
    for name, module in targets.items():
        if not (is_adaptable(module) or isinstance(module, Adapted)):
            raise ValueError(
                f"target_modules: {name!r} is a {type(module).__name__}, but adapters go to "
                "nn.Linear, nn.Embedding and transformers' Conv1D; exclude it with exclude_modules"
            )
    if not targets:
        raise ValueError(f"target_modules: {config.target_modules!r} leaves no module to adapt")
    _check_ties(paths, targets)
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field):
            if all(lookup({pattern: True}, name) is None for name in targets):
                raise ValueError(
                    f"{field}: {pattern!r} matches none of the {len(targets)} targets"
                    + _near_misses(pattern, targets)
                )
    return targets


def find_whole(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """{first name: module} of the modules to train whole."""
    found: dict[str, nn.Module] = {}
    paths = module_paths(model)
    for wanted in names:
        matches = [m for m, own in paths.items() if any(has_suffix(n, wanted) for n in own)]
        if not matches:
            every = [name for own in paths.values() for name in own if name]
            raise ValueError(
                f"modules_to_save: {wanted!r} matches no module" + _near_misses(wanted, every)
            )
        found.update({paths[module][0]: module for module in matches})
    return found


def _selected(
    model: nn.Module, paths: dict[nn.Module, list[str]], wanted: Sequence[str] | str, field: str
) -> list[nn.Module]:
    adaptable = [m for m in paths if is_adaptable(m) or isinstance(m, Adapted)]
    names = [name for module in adaptable for name in paths[module]]
    if wanted == ALL_LINEAR:
        output = getattr(model, "get_output_embeddings", lambda: None)()
        return [m for m in adaptable if not isinstance(m, nn.Embedding) and m is not output]
    if isinstance(wanted, str):
        matches = [m for m in adaptable if any(re.fullmatch(wanted, n) for n in paths[m])]
        if not matches:
            raise ValueError(
                f"{field}: the regular expression {wanted!r} matches no whole name of a layer"
                + _near_misses(wanted, names)
            )
        return matches
    matches = []
    for suffix in wanted:
        found = [m for m, own in paths.items() if any(has_suffix(n, suffix) for n in own)]
        if not found:
            raise ValueError(f"{field}: {suffix!r} matches no module" + _near_misses(suffix, names))
        matches.extend(found)
    return [module for module in paths if module in set(matches)]


def _near_misses(wanted: str, names: Iterable[str]) -> str:
    """; the closest names and suffixes, or else the last parts that occur."""
    suffixes = {".".join(n.split(".")[i:]) for n in names for i in range(n.count(".") + 1)}
    close = difflib.get_close_matches(wanted, sorted(suffixes), n=5, cutoff=0.6)
    if close:
        return f"; did you mean {', '.join(map(repr, close))}?"
    last = sorted({name.split(".")[-1] for name in names if name})
    return f"; names end in {', '.join(map(repr, last[:20]))}" if last else ""


def _check_ties(paths: dict[nn.Module, list[str]], targets: dict[str, nn.Module]) -> None:
    """Refuses targets whose weight another module uses too: it is one matrix with two functions."""
    owners: dict[int, list[str]] = {}
    for module, own in paths.items():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(own[0])
    for name, module in targets.items():
        others = [other for other in owners[id(module.weight)] if other != name]
        if others:
            raise ValueError(
                f"target_modules: {name!r} has its weight tied to {', '.join(map(repr, others))}, "
                "so an adapter on one would untie them; exclude it or untie first"
            )
