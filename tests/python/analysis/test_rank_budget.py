# Ranks within a budget: against every choice there is, and by their rules over random problems.
from fractions import Fraction
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.rank_budget import Room, best_directions, cost_of, in_proportion


@st.composite
def problems(draw, alike=False):
    """Rooms of one to four matrices, and a budget from what their lowest ranks cost."""
    cost = st.just(draw(st.integers(1, 9))) if alike else st.integers(1, 9)
    rooms = {}
    for name in range(draw(st.integers(1, 4))):
        highest = draw(st.integers(0, 4))
        rooms[str(name)] = Room(draw(cost), draw(st.integers(0, highest)), highest)
    least = sum(room.cost * room.lowest for room in rooms.values())
    return rooms, least + draw(st.integers(0, 60))


def scores_of(rooms, data):
    return {name: data.draw(st.sampled_from([0.0, 0.1, 1.0, 1.5, 3.0])) for name in rooms}


def falling(rooms, data):
    value = st.sampled_from([0.0, 0.25, 1.0, 2.0, 7.0])
    return {
        name: sorted(
            data.draw(st.lists(value, min_size=room.highest, max_size=room.highest)), reverse=True
        )
        for name, room in rooms.items()
    }


def choices(rooms, budget):
    ranges = [range(room.lowest, room.highest + 1) for room in rooms.values()]
    for ranks in product(*ranges):
        chosen = dict(zip(rooms, ranks, strict=True))
        if cost_of(chosen, rooms) <= budget:
            yield chosen


def exact_ranks(scores, rooms, budget):
    """Those that are no integers yet, by bisection."""
    low, high = Fraction(0), Fraction(1000)
    for _ in range(60):
        middle = (low + high) / 2
        fits = cost_of(clamped(middle, scores, rooms), rooms) <= budget
        low, high = (middle, high) if fits else (low, middle)
    return clamped(low, scores, rooms)


def clamped(level, scores, rooms):
    return {n: min(max(level * Fraction(scores[n]), r.lowest), r.highest) for n, r in rooms.items()}


@given(problems(), st.data())
def test_in_proportion_stays_within_and_a_whole_rank_from_exact(problem, data):
    rooms, budget = problem
    scores = scores_of(rooms, data)
    ranks = in_proportion(scores, rooms, budget)
    assert cost_of(ranks, rooms) <= budget
    assert all(rooms[n].lowest <= rank <= rooms[n].highest for n, rank in ranks.items())
    exact = exact_ranks(scores, rooms, budget)
    assert all(abs(ranks[n] - exact[n]) < 1 + Fraction(1, 10**9) for n in rooms)
    left = budget - cost_of(ranks, rooms)
    short = [n for n in rooms if ranks[n] + Fraction(1, 10**9) < exact[n]]
    assert all(rooms[n].cost > left for n in short)


@given(problems(alike=True), st.data())
def test_in_proportion_is_nearest_to_exact_where_costs_are_alike(problem, data):
    """The largest remainder's known property: the least sum of differences, as of squares."""
    rooms, budget = problem
    scores = scores_of(rooms, data)
    ranks = in_proportion(scores, rooms, budget)
    if 0.0 in scores.values() or cost_of(ranks, rooms) == cost_of(
        {n: r.highest for n, r in rooms.items()}, rooms
    ):
        return  # not all of the budget can be in proportion
    cost = next(iter(rooms.values())).cost
    whole = budget // cost * cost
    equal = in_proportion(scores, rooms, whole)
    assert sum(equal.values()) == whole // cost  # nothing that fits is left
    same = [c for c in choices(rooms, whole) if cost_of(c, rooms) == whole]
    exact = exact_ranks(scores, rooms, whole)

    def far(chosen):
        return sum((chosen[n] - exact[n]) ** 2 for n in rooms)

    assert far(equal) <= min(map(far, same)) + Fraction(1, 10**9)


@given(problems(), st.data())
def test_best_directions_lose_at_most_one_direction(problem, data):
    """A knapsack in order of density: within the best direction that was passed over."""
    rooms, budget = problem
    scores = falling(rooms, data)
    ranks = best_directions(scores, rooms, budget)
    assert cost_of(ranks, rooms) <= budget

    def worth(chosen):
        return sum(sum(scores[name][:rank]) for name, rank in chosen.items())

    most = max(map(worth, choices(rooms, budget)))
    passed = [scores[n][ranks[n]] for n, room in rooms.items() if ranks[n] < room.highest]
    assert most <= worth(ranks) + max(passed, default=0.0) + 1e-9
    left = budget - cost_of(ranks, rooms)
    assert all(rooms[n].cost > left for n in rooms if ranks[n] < rooms[n].highest)


@given(problems(alike=True), st.data())
def test_best_directions_are_best_where_costs_are_alike(problem, data):
    rooms, budget = problem
    scores = falling(rooms, data)
    ranks = best_directions(scores, rooms, budget)

    def worth(chosen):
        return sum(sum(scores[name][:rank]) for name, rank in chosen.items())

    assert worth(ranks) == pytest.approx(max(map(worth, choices(rooms, budget))))


def test_ties_go_by_order():
    rooms = {name: Room(10, 0, 4) for name in "abc"}
    assert in_proportion(dict.fromkeys("abc", 2.0), rooms, 50) == {"a": 2, "b": 2, "c": 1}
    assert best_directions(dict.fromkeys("abc", [1.0] * 4), rooms, 50) == {"a": 4, "b": 1, "c": 0}


def test_a_full_matrix_leaves_its_part_to_the_others():
    rooms = {"a": Room(1, 0, 2), "b": Room(1, 0, 100), "c": Room(1, 1, 100)}
    assert in_proportion({"a": 8.0, "b": 1.0, "c": 0.0}, rooms, 20) == {"a": 2, "b": 17, "c": 1}


def test_directions_count_by_what_they_cost():
    rooms = {"dear": Room(10, 0, 1), "cheap": Room(1, 0, 3)}
    assert best_directions({"dear": [3.0], "cheap": [1.0] * 3}, rooms, 10) == {
        "dear": 0,
        "cheap": 3,
    }
    assert best_directions({"dear": [30.1], "cheap": [3.0] * 3}, rooms, 11) == {
        "dear": 1,
        "cheap": 1,
    }
