"""rank_pattern and alpha_pattern: the value that each module gets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ._library import library
from .targets import compiled, near_misses


def pattern_values(field: str, patterns: Mapping, targets: Mapping[str, list[str]]) -> dict:
    """{module: value} of the first pattern that fits one of a module's names.

    A pattern is a name, a dotted suffix, or a regular expression for one of these.

    Args:
        field: the name of `patterns` in messages.
        patterns: {pattern: value}, of which the first that fits counts.
        targets: {module: all its names}.

    Raises:
        ValueError: a pattern is no regular expression, or fits no target.
    """
    first = _FirstPattern(field, patterns)
    chosen = {module: first(names) for module, names in targets.items()}
    names, used = [name for own in targets.values() for name in own], set(chosen.values())
    for pattern in patterns:
        if pattern not in used and not any(map(_matcher(field, pattern).fullmatch, names)):
            raise ValueError(
                f"{field}: {pattern!r} matches none of the {len(targets)} targets"
                + near_misses(pattern, targets)
            )
    return {module: patterns[pattern] for module, pattern in chosen.items() if pattern is not None}


class _FirstPattern:
    """Finds the first pattern that fits; without trying each, but for those with regex syntax."""

    def __init__(self, field: str, patterns: Iterable[str]) -> None:
        self._order = {pattern: place for place, pattern in enumerate(patterns)}
        self._plain = [p for p in patterns if library.is_plain_pattern(p)]
        self._index = library.PatternIndex(self._plain)
        others = [p for p in patterns if not library.is_plain_pattern(p)]
        self._expressions = {p: _matcher(field, p) for p in others}

    def __call__(self, names: Iterable[str]) -> str | None:
        places = (self._index.find(name) for name in names)
        fitting = [self._plain[place] for place in places if place is not None]
        fitting += [p for p, m in self._expressions.items() if any(map(m.fullmatch, names))]
        return min(fitting, key=self._order.__getitem__, default=None)


def _matcher(field: str, pattern: str) -> re.Pattern:
    compiled(field, pattern)  # alone, for its message
    return re.compile(rf"(.*\.)?({pattern})")
