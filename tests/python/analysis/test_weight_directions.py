# Amplification and intruder directions against dense SVDs.
import numpy as np
import pytest
import torch
from dense import clusters, dense, factor_pairs, norm, svd
from hypothesis import given
from hypothesis import strategies as st

from rankwise import analysis
from rankwise.analysis import Update


def weight_for(update: Update) -> torch.Tensor:
    make = torch.Generator().manual_seed(update.rank)
    return torch.randn(len(update.lora_B), update.lora_A.shape[1], generator=make).double()


@given(factor_pairs(), st.integers(0, 15) | st.none())
def test_amplification_is_the_dense_one(update, rank):
    W, matrix = weight_for(update), dense(update)
    U, s, V = svd(matrix)
    k = len(s) if rank is None else min(rank, len(s))
    found = analysis.amplification_factor(W, update, rank)
    assert found.rank == k
    assert found.update_norm == pytest.approx(norm(matrix), rel=1e-10, abs=1e-12)
    assert found.weight_norm == pytest.approx(norm(W.numpy()), rel=1e-10)
    own = np.linalg.svd(W.numpy(), compute_uv=False)[:k]
    assert found.along_weight == pytest.approx(norm(own), rel=1e-10)
    if k == 0:
        assert found.factor == found.along_update == found.along_random == 0
    elif k - 1 in clusters(s):
        along = norm(U[:, :k].T @ W.numpy() @ V[:, :k])
        assert found.along_update == pytest.approx(along, rel=1e-10, abs=1e-10)
        assert found.factor == pytest.approx(found.update_norm / found.along_update, rel=1e-12)
    assert found.along_random <= found.along_weight * (1 + 1e-12)


def test_random_directions_follow_the_seed_and_miss_the_weight():
    W, update = torch.randn(60, 80), Update(torch.randn(4, 80), torch.randn(60, 4))
    first = analysis.amplification_factor(W, update, seed=3)
    assert first == analysis.amplification_factor(W, update, seed=3)
    assert first.along_random != analysis.amplification_factor(W, update, seed=4).along_random
    found = [analysis.amplification_factor(W, update, seed=s).along_random for s in range(40)]
    expected = norm(W.numpy()) * 4 / np.sqrt(60 * 80)  # E ||U^T W V||^2 = ||W||^2 k^2 / (out in)
    assert np.sqrt(np.mean(np.square(found))) == pytest.approx(expected, rel=0.1)


def test_the_weights_own_directions_may_be_left_out():
    W, update = torch.randn(6, 8), Update(torch.randn(2, 8), torch.randn(6, 2))
    rest, all_of_them = (analysis.amplification_factor(W, update, own=own) for own in (False, True))
    assert np.isnan(rest.along_weight) and all_of_them.along_weight > 0
    for name in ("factor", "along_update", "along_random", "weight_norm"):
        assert getattr(rest, name) == getattr(all_of_them, name)


def test_an_update_along_the_weights_own_directions_amplifies_least():
    W = torch.randn(30, 20).double()
    U, S, Vh = torch.linalg.svd(W)
    found = analysis.amplification_factor(W, Update(S[:3, None] * Vh[:3], U[:, :3]))
    assert found.along_update == pytest.approx(
        found.along_weight
    ) and found.factor == pytest.approx(1)


@pytest.mark.parametrize("shape", [(40, 7), (7, 40), (2000, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_and_strided_weights(shape, dtype):
    update = Update(torch.randn(3, shape[1]), torch.randn(shape[0], 3))
    W = torch.randn(shape[::-1]).to(dtype).t()
    one, two = (analysis.amplification_factor(w, update) for w in (W, W.double().contiguous()))
    assert one.along_update == pytest.approx(two.along_update, rel=1e-12)
    assert one.along_weight == pytest.approx(two.along_weight, rel=1e-12)


@given(factor_pairs())
def test_intruders_are_those_that_no_direction_of_the_weight_is_like(update):
    W = weight_for(update)
    found = analysis.intruder_directions(W, update, threshold=0.7, count=5)
    before = np.linalg.svd(W.numpy(), full_matrices=False)[0]
    U, s, _ = np.linalg.svd(W.numpy() + dense(update), full_matrices=False)
    k = min(5, len(s))
    cosines = np.abs(before.T @ U[:, :k]).max(0)
    np.testing.assert_allclose(found.singular_values, s[:k], rtol=1e-10, atol=1e-10)
    apart = [i for i in clusters(s[:k]) if i == 0 or i - 1 in clusters(s)]
    np.testing.assert_allclose(found.cosines.numpy()[apart], cosines[apart], rtol=0, atol=1e-10)
    assert found.indices == [i for i in range(k) if found.cosines[i] < 0.7]


def test_a_planted_intruder_is_found():
    W = torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0]))
    new = torch.ones(8, 1) / 8**0.5
    found = analysis.intruder_directions(W, Update(new.t() * 50, new), count=3)
    assert found.indices == [0] and found.cosines[0] < 0.5
    same = analysis.intruder_directions(W, Update(W[:1], torch.eye(8)[:, :1]))
    assert same.indices == [] and len(same.cosines) == 8


UPDATE = Update(torch.ones(2, 5), torch.ones(4, 2))
WEIGHT = torch.ones(4, 5)
HOLED = WEIGHT.clone().index_put_((torch.tensor(3), torch.tensor(4)), torch.tensor(float("inf")))


@pytest.mark.parametrize("function", [analysis.amplification_factor, analysis.intruder_directions])
@pytest.mark.parametrize(
    "weight, message",
    [
        (torch.ones(5, 4), r"weight must be floating \[4, 5\], got .*\[5, 4\]"),
        (HOLED, "weight must be finite, got infinite or NaN"),
        (torch.ones(4, 5, device="meta"), "weight must be dense, with data, got .*meta"),
        (None, "weight must be a tensor, got None"),
    ],
)
def test_weights_that_do_not_fit_are_named(function, weight, message):
    with pytest.raises(ValueError, match=f"^{function.__name__}: {message}"):
        function(weight, UPDATE)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: analysis.amplification_factor(WEIGHT, UPDATE, rank=-1),
            "amplification_factor: rank must be at least 0, got -1",
        ),
        (
            lambda: analysis.amplification_factor(WEIGHT, UPDATE, seed=-1),
            "amplification_factor: seed must be at least 0, got -1",
        ),
        (
            lambda: analysis.intruder_directions(WEIGHT, UPDATE, threshold=2),
            "intruder_directions: threshold must be from 0 to 1, got 2",
        ),
        (
            lambda: analysis.intruder_directions(WEIGHT, UPDATE, count=0),
            "intruder_directions: count must be at least 1, got 0",
        ),
        (
            lambda: analysis.intruder_directions(WEIGHT, UPDATE, count=1.5),
            "intruder_directions: count must be an integer, got 1.5",
        ),
    ],
)
def test_options_that_are_wrong_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
