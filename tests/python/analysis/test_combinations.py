# Truncation and combination against the dense sums and PEFT's own functions.
import itertools

import numpy as np
import pytest
import torch
from dense import dense, factor_pairs, norm, shapes
from hypothesis import given
from hypothesis import strategies as st
from peft.utils import merge_utils

from rankwise import analysis
from rankwise.analysis import Update


@given(factor_pairs(), st.integers(0, 15))
def test_truncation_is_the_best_and_its_error_the_dropped_tail(update, rank):
    matrix = dense(update)
    U, s, Vh = np.linalg.svd(matrix, full_matrices=False)
    found = analysis.truncate(update, rank)
    scale = max(norm(matrix), 1e-3)
    assert found.update.rank <= rank and found.update.scaling == 1
    change = norm(dense(found.update) - matrix)
    assert found.error == pytest.approx(norm(s[rank:]), abs=1e-10 * scale)
    assert change == pytest.approx(found.error, abs=1e-10 * scale)
    wanted = found.error / norm(matrix) if matrix.any() else 0
    assert found.relative_error == pytest.approx(wanted, abs=1e-12)


@st.composite
def several(draw):
    shape, count = draw(shapes()), draw(st.integers(1, 4))
    weights = [draw(st.sampled_from([1.0, -1.0, 0.3, 0.0, 2.5])) for _ in range(count)]
    return [draw(factor_pairs(shape)) for _ in range(count)], weights


@given(several())
def test_linear_is_the_exact_sum(case):
    updates, weights = case
    wanted = sum(w * dense(u) for w, u in zip(weights, updates, strict=True))
    found = analysis.combine(updates, weights)
    scale = max(norm(wanted), max(norm(dense(u)) for u in updates), 1e-3)
    np.testing.assert_allclose(dense(found.update), wanted, rtol=0, atol=1e-12 * scale)
    assert found.error <= 1e-12 * scale and found.update.rank <= min(wanted.shape)


@given(several(), st.integers(0, 6))
def test_linear_of_a_rank_is_the_best_of_it(case, rank):
    updates, weights = case
    wanted = sum(w * dense(u) for w, u in zip(weights, updates, strict=True))
    found = analysis.combine(updates, weights, rank=rank)
    scale = max(norm(wanted), max(norm(dense(u)) for u in updates), 1e-3)
    tail = norm(np.linalg.svd(wanted, compute_uv=False)[rank:])
    assert norm(dense(found.update) - wanted) == pytest.approx(tail, abs=1e-10 * scale)
    assert found.error == pytest.approx(tail, abs=1e-10 * scale)


def test_what_cancels_leaves_no_direction():
    update = Update(torch.randn(3, 9), torch.randn(7, 3), torch.randn(3, 1), 0.7)
    assert analysis.combine([update, update], [0.5, 0.5]).update.rank == 3
    assert analysis.combine([update, update], [1.0, -1.0]).update.rank == 0


def test_no_products_of_one_adapters_B_with_anothers_A():
    """PEFT's "linear" has them: sqrt weights on factors."""
    one, two = (
        Update(torch.eye(4)[:1], torch.eye(4)[:, :1]),
        Update(-torch.eye(4)[:1], torch.eye(4)[:, 1:2]),
    )
    found = analysis.combine([one, two], [1.0, 1.0]).update.dense()
    torch.testing.assert_close(found, one.dense() + two.dense(), rtol=0, atol=1e-15)


def generic(shape=(11, 8), ranks=(2, 5, 3)):
    return [
        Update(
            torch.randn(r, shape[1]).double(),
            torch.randn(shape[0], r).double(),
            torch.randn(r, 1).double() if r == 3 else None,
            scaling,
        )
        for r, scaling in zip(ranks, (1.0, -0.5, 2.0), strict=True)
    ]


WEIGHTS = [0.5, -1.5, 2.0]
METHODS = {"ties": merge_utils.ties, "magnitude_prune": merge_utils.magnitude_prune}


@pytest.mark.parametrize("density", [0.1, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:The density")
def test_ties_and_pruning_are_pefts_on_dense_updates(method, sign, density):
    updates = generic()
    signs = {"majority_sign_method": sign} if method == "ties" else {}
    tasks = [u.dense() for u in updates]
    wanted = METHODS[method](tasks, torch.tensor(WEIGHTS).double(), density, **signs)
    options = dict(method=method, density=density, majority_sign=sign)
    found = analysis.combine(updates, WEIGHTS, rank=8, **options)
    torch.testing.assert_close(found.update.dense(), wanted, rtol=0, atol=1e-12)
    tail = torch.linalg.svdvals(wanted)[3:].norm().item()
    assert analysis.combine(updates, WEIGHTS, rank=3, **options).error == pytest.approx(
        tail, rel=1e-10
    )


def masks(updates, density):
    """Every element's possible values under DARE: its share of each update or nothing of it."""
    for kept in itertools.product((0, 1), repeat=len(updates)):
        yield [k * u.dense() / density for k, u in zip(kept, updates, strict=True)]


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_drops_elements_and_divides_the_others(method):
    updates, weights = generic((30, 40)), torch.tensor(WEIGHTS).double()
    rest = merge_utils.task_arithmetic if method == "dare_linear" else merge_utils.ties
    possible = []
    for tasks in masks(updates, 0.6):
        options = () if method == "dare_linear" else (1.0,)
        with pytest.warns(UserWarning) if options else torch.no_grad():
            possible.append(rest(tasks, weights, *options))
    options = dict(method=method, density=0.6, rank=30)
    found = analysis.combine(updates, WEIGHTS, seed=5, **options).update.dense()
    apart = (torch.stack(possible) - found).abs().min(0).values
    assert apart.max() < 1e-10
    again = analysis.combine(updates, WEIGHTS, seed=5, **options).update.dense()
    other = analysis.combine(updates, WEIGHTS, seed=6, **options).update.dense()
    assert torch.equal(found, again) and (found - other).abs().max() > 0.1


def test_dare_keeps_the_part_that_was_asked_for_of_each_update():
    updates = [Update(torch.ones(1, 100), torch.ones(100, 1)) for _ in range(2)]
    found = analysis.combine(updates, [1.0, 10.0], method="dare_linear", density=0.3, rank=100)
    counts = torch.bincount((found.update.dense() * 0.3).round().long().flatten(), minlength=12)
    kept = [counts[1] + counts[11], counts[10] + counts[11]]
    assert all(2800 < k < 3200 for k in kept) and 750 < counts[11] < 1050


@pytest.mark.parametrize(
    "method", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
)
def test_the_number_of_threads_changes_no_bit(method):
    updates = [Update(torch.randn(20, 150), torch.randn(130, 20)) for _ in range(3)]
    found = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        update = analysis.combine(updates, WEIGHTS, method=method, rank=40).update
        found.append((update.lora_A, update.lora_B))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_updates_of_rank_0_are_zeros(method):
    none = Update(torch.zeros(0, 8), torch.zeros(11, 0))
    found = analysis.combine([none, none], [1.0, 1.0], method=method, rank=4)
    assert found.update.rank == 0 and found.error == found.relative_error == 0


ONE, OTHER = generic((4, 5), (2, 1, 3))[0], generic((4, 6), (2, 1, 3))[0]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: analysis.combine([], []), "combine: there must be at least one update, got none"),
        (
            lambda: analysis.combine([ONE], [1, 2]),
            "combine: weights must be 1 like the updates, got 2",
        ),
        (lambda: analysis.combine([ONE], ["a"]), "combine: weights must be numbers, got"),
        (
            lambda: analysis.combine([ONE], [float("nan")]),
            "combine: weights must be finite, got nan",
        ),
        (
            lambda: analysis.combine([ONE, OTHER], [1, 1]),
            r"combine: updates\[1\] must be an update of \[4, 5\] like updates\[0\], .*\[4, 6\]",
        ),
        (
            lambda: analysis.combine([ONE], [1], method="ties"),
            "combine: rank must be given where the method is not linear",
        ),
        (
            lambda: analysis.combine([ONE], [1], method="ties", rank=1, density=0),
            "combine: density must be above 0 and at most 1, got 0",
        ),
        (
            lambda: analysis.combine([ONE], [1], method="dare_ties", rank=1, density=float("nan")),
            "combine: density must be above 0 and at most 1, got nan",
        ),
        (lambda: analysis.combine([ONE], [1], method="svd"), "combine: method must be one of"),
        (lambda: analysis.combine([ONE], [1], majority_sign="all"), "majority_sign must be one of"),
        (lambda: analysis.combine([ONE], [1], rank=-2), "combine: rank must be at least 0, got -2"),
        (lambda: analysis.truncate(ONE, -1), "truncate: rank must be at least 0, got -1"),
        (lambda: analysis.truncate(ONE, True), "truncate: rank must be an integer, got True"),
    ],
)
def test_errors_say_what_was_wanted(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: analysis.combine(ONE, [1.0]), "combine: updates must be a list, got Update"),
        (lambda: analysis.combine({"q": ONE}, [1.0]), "updates must be a list, got dict"),
        (lambda: analysis.combine([ONE], 0.5), "combine: weights must be a list, got float"),
        (
            lambda: analysis.combine(["q"], [1.0]),
            r"updates\[0\] must be an Update or a layer .*, got str",
        ),
        (lambda: analysis.combine_folders("a", [1.0], "b"), "folders must be a list, got str"),
    ],
)
def test_other_types_are_refused(call, message):
    with pytest.raises(TypeError, match=message):
        call()
