# The allocator's oracle against numbers worked out by hand.
import math

import numpy as np
import pytest
from allocation_oracle import Module, Options, Oracle, penalty, select


def test_two_steps_of_the_averages_by_hand():
    module = Module(2, 1, 1, np.float64)
    factors = {"A": np.array([[2.0, 1.0]]), "B": np.array([[1.0]]), "E": np.array([[3.0]])}
    gradients = {"A": np.array([[1.0, -4.0]]), "B": np.array([[8.0]]), "E": np.array([[-2.0]])}
    module.update(factors, gradients, 0.5, 0.75)
    # I = 2, 4 | 8 | 6;  S = I / 2;  U = |I - S| / 4
    assert module.S["A"].tolist() == [[1.0, 2.0]] and module.U["A"].tolist() == [[0.25, 0.5]]
    assert module.scores() == [3 * 0.75 + (1 * 0.25 + 2 * 0.5) / 2 + 4 * 1]
    module.update(factors, gradients, 0.5, 0.75)
    # S(E) = 1.5 + 3;  U(E) = 0.75 * 0.75 + 0.25 * |6 - 4.5|
    assert module.S["E"].item() == 4.5 and module.U["E"].item() == 0.9375


def test_the_schedule_by_hand():
    options = Options(2, total_steps=14, warmup_steps=2, final_steps=2, allocation_interval=4)
    # rest = 1 - (t - 2) / 10; 20 + 64 rest^3 of 84 -> 20
    assert [options.budget(t, 84, 20) for t in (1, 2, 3, 7, 11, 12, 14)] == [
        84, 84, 66, 28, 20, 20, 20,
    ]  # fmt: skip
    assert [t for t in range(1, 15) if options.allocates(t)] == [4, 8, 12]


def test_selection_by_hand():
    scores, owner = np.array([1.0, 5.0, 5.0, 2.0, 2.0, 9.0]), [0, 0, 1, 1, 2, 2]
    assert select(scores, owner, [1, 1, 1], 3, 0).tolist() == [0, 1, 1, 0, 0, 1]
    assert select(scores, owner, [1, 1, 1], 2, 0).tolist() == [0, 1, 0, 0, 0, 1]  # tie: the first
    assert select(scores, owner, [1, 1, 1], 4, 0).tolist() == [0, 1, 1, 1, 0, 1]
    assert select(scores, owner, [1, 1, 1], 0, 0).tolist() == [0] * 6
    assert select(scores, owner, [4, 4, 10], 9, 0).tolist() == [0, 1, 1, 0, 0, 0]  # 10: too much
    assert select(np.zeros(6), owner, [1, 1, 1], 3, 1).tolist() == [1, 0, 1, 0, 1, 0]


def test_a_run_keeps_the_only_direction_with_gradients():
    run = Oracle([Module(1, 1, 2, np.float64)], Options(1, total_steps=2))
    ones = {"A": np.ones((2, 1)), "B": np.ones((1, 2)), "E": np.ones((2, 1))}
    gradient = {f: np.zeros_like(w) for f, w in ones.items()} | {"E": np.array([[0.0], [1.0]])}
    assert run.step([ones], [gradient]) and run.step([ones], [gradient]) and run.frozen
    assert run.kept.tolist() == [False, True] and run.ranks() == [1]
    assert [entry["budget"] for entry in run.history] == [1, 1]


def test_penalty_by_hand():
    A, B = np.array([[2.0, 0.0], [9.0, 9.0]]), np.array([[1.0, 7.0], [0.0, 7.0]])
    value, gA, gB = penalty([A], [B], [1], squared=True)  # D = 3 and 0
    assert value == 9.0
    assert gA[0].tolist() == [[24.0, 0.0], [0.0, 0.0]] and not gB[0].any()
    value, gA, _ = penalty([A], [B], [1], squared=False)
    assert value == pytest.approx(1.5) and gA[0].tolist() == [[2.0, 0.0], [0.0, 0.0]]
    assert math.isfinite(penalty([A], [B], [0], squared=False)[0])
