"""Scores of matrices, or of their directions, and the ranks within a budget that follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

from ..config import _is_real, _require
from ..rank_budget import Rooms, best_directions, in_proportion


@dataclass(frozen=True)
class MatrixScores:
    """A score of each matrix; ranks are in proportion to them.

    Args:
        scores: {module: finite, at least 0}.
        sizes: {module: (out, in)}.
        meaning: of a score, in a word or two.
    """

    scores: Mapping[str, float]
    sizes: Mapping[str, tuple[int, int]]
    meaning: str = "score"

    def __post_init__(self) -> None:
        _check_scores("MatrixScores", {n: [score] for n, score in self.scores.items()}, self.sizes)

    def highest(self, module: str) -> int:
        """The most directions of which this can say something."""
        return min(self.sizes[module])

    def ranks(self, rooms: Rooms, budget: int) -> dict[str, int]:
        return in_proportion(self.scores, rooms, budget)

    def shown(self, module: str) -> float:
        return self.scores[module]


@dataclass(frozen=True)
class DirectionScores:
    """A score of each direction of each matrix; the best for their parameters are taken.

    Args:
        scores: {module: of its first, second, ... direction}, falling, finite, at least 0.
        sizes: {module: (out, in)}.
        meaning: of their sum, in a word or two.
    """

    scores: Mapping[str, Sequence[float]]
    sizes: Mapping[str, tuple[int, int]]
    meaning: str = "score"

    def __post_init__(self) -> None:
        _check_scores("DirectionScores", self.scores, self.sizes)
        for module, own in self.scores.items():
            _require(list(own) == sorted(own, reverse=True), "DirectionScores",
                     f"scores of {module!r}", "falling", list(own))  # fmt: skip

    def highest(self, module: str) -> int:
        """The most directions of which this can say something."""
        return min(len(self.scores[module]), *self.sizes[module])

    def ranks(self, rooms: Rooms, budget: int) -> dict[str, int]:
        return best_directions(self.scores, rooms, budget)

    def shown(self, module: str) -> float:
        return sum(self.scores[module])


Evidence = MatrixScores | DirectionScores


def _check_scores(
    owner: str, scores: Mapping[str, Sequence[float]], sizes: Mapping[str, tuple[int, int]]
) -> None:
    same = scores.keys() == sizes.keys() and len(scores) > 0
    _require(same, owner, "sizes", f"of the modules {sorted(scores)}", sorted(sizes))
    for module, own in scores.items():
        fits = all(_is_real(score) and isfinite(score) and score >= 0 for score in own)
        _require(fits, owner, f"scores of {module!r}", "finite numbers >= 0", list(own))
