"""Integer ranks within a budget of parameters: in proportion to scores, or the best directions."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import floor
from typing import NamedTuple


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
    ties by order, each gets one more where that fits. So no rank is a whole one away from exact.

    Args:
        budget: at least what the lowest ranks cost.
    """
    exact = _at(_level(scores, rooms, budget), scores, rooms)
    ranks = {name: floor(rank) for name, rank in exact.items()}
    left = budget - cost_of(ranks, rooms)
    for name in sorted(exact, key=lambda name: ranks[name] - exact[name]):
        if exact[name] > ranks[name] and rooms[name].cost <= left:
            ranks[name] += 1
            left -= rooms[name].cost
    return ranks


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
    ranks = {name: room.lowest for name, room in rooms.items()}
    left = budget - cost_of(ranks, rooms)
    order = [
        (-score / rooms[name].cost, name)
        for name, own in scores.items()
        for score in own[rooms[name].lowest : rooms[name].highest]
    ]
    for _, name in sorted(order, key=lambda direction: direction[0]):
        if rooms[name].cost <= left:
            ranks[name] += 1
            left -= rooms[name].cost
    return ranks


def _level(scores: Mapping[str, float], rooms: Rooms, budget: int) -> Fraction:
    """Where the exact ranks cost the budget, or the last at which one of them grows.

    Between levels at which a rank leaves or reaches its room the cost is linear.
    """

    def cost(level: Fraction) -> Fraction:
        return cost_of(_at(level, scores, rooms), rooms)

    bounds = {
        Fraction(bound) / Fraction(scores[name])
        for name, room in rooms.items()
        for bound in room[1:]
        if scores[name] > 0
    }
    levels = sorted({Fraction(0), *bounds})
    place = bisect_right(levels, budget, key=cost)
    if place == len(levels):
        return levels[-1]
    below, above = levels[place - 1], levels[place]
    part = (budget - cost(below)) / (cost(above) - cost(below))
    return below + part * (above - below)


def _at(level: Fraction, scores: Mapping[str, float], rooms: Rooms) -> dict[str, Fraction]:
    return {
        name: min(max(level * Fraction(scores[name]), Fraction(room.lowest)), room.highest)
        for name, room in rooms.items()
    }
