"""Integer ranks within a budget of parameters: in proportion to scores, or the best directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ._library import library

_core = library.analysis
_LARGEST = 2**63 - 1


class Room(NamedTuple):
    """What each rank of a matrix costs, in + out, and between which ranks it may be given some."""

    cost: int
    lowest: int
    highest: int


Rooms = Mapping[str, Room]


def cost_of(ranks: Mapping[str, float], rooms: Rooms):
    """In parameters."""
    return sum(rank * rooms[name].cost for name, rank in ranks.items())


def in_proportion(scores: Mapping[str, float], rooms: Rooms, budget: int) -> dict[str, int]:
    """Ranks as scores are, by the largest remainder.

    The exact ranks are ``level * score`` within their rooms, at the level at which they cost the
    budget. Rounded down, they leave some of it; in the order of what rounding took, largest first,
    ties (in float) by order, each gets one more where that fits. So no rank is a whole one away
    from exact.

    Args:
        budget: at least what the lowest ranks cost.
    """
    own = [float(scores[name]) for name in rooms]
    ranks = _core.in_proportion(own, _for_library(rooms, rooms), min(budget, _LARGEST))
    return dict(zip(rooms, ranks, strict=True))


def best_directions(
    scores: Mapping[str, Sequence[float]], rooms: Rooms, budget: int
) -> dict[str, int]:
    """How many of each matrix's directions are among the best for what they cost.

    The lowest ranks first, then all directions in one order, by their score for each parameter,
    ties by order; each is taken where it fits. Where all cost the same, no other choice within the
    budget has a larger sum of scores.

    Args:
        scores: of the first, second, ... direction of each matrix; falling.
        budget: at least what the lowest ranks cost.
    """
    own = [list(map(float, values)) for values in scores.values()]
    found = _core.best_directions(own, _for_library(scores, rooms), min(budget, _LARGEST))
    ranks = dict(zip(scores, found, strict=True))
    return {name: ranks[name] for name in rooms}


def _for_library(names, rooms: Rooms) -> list:
    return [_core.RankRoom(*rooms[name]) for name in names]
