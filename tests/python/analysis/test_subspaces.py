# Spectra, subspace similarity and effective ranks against the dense update.
import numpy as np
import pytest
import torch
from dense import clusters, dense, factor_pairs, shapes, similarity, svd
from hypothesis import given
from hypothesis import strategies as st

import rankwise as rw
from rankwise import analysis
from rankwise.analysis import Update


@given(factor_pairs())
def test_the_spectrum_is_the_dense_updates(update):
    matrix = dense(update)
    found = analysis.delta_spectrum(update)
    U, S, V = (t.numpy() for t in (found.U, found.S, found.V))
    k = min(update.rank, *matrix.shape)
    assert U.shape == (matrix.shape[0], k) and S.shape == (k,) and V.shape == (matrix.shape[1], k)
    scale = max(np.linalg.norm(matrix), 1e-3)
    np.testing.assert_allclose(
        S, np.linalg.svd(matrix, compute_uv=False)[:k], rtol=0, atol=1e-10 * scale
    )
    np.testing.assert_allclose((U * S) @ V.T, matrix, rtol=0, atol=1e-10 * scale)
    np.testing.assert_allclose(U.T @ U, np.eye(k), rtol=0, atol=1e-10)
    np.testing.assert_allclose(V.T @ V, np.eye(k), rtol=0, atol=1e-10)


def directions(update: Update, of: str):
    """The oracle's directions and singular values."""
    if of == "lora_A":
        U, s, V = svd(update.lora_A.numpy())
    elif of == "lora_B":
        U, s, V = svd(update.lora_B.numpy())
    else:
        U, s, V = svd(dense(update))
    return (V if of in ("input", "lora_A") else U), s


@st.composite
def pairs(draw):
    shape = draw(shapes())
    return draw(factor_pairs(shape)), draw(factor_pairs(shape))


@given(pairs(), st.sampled_from(["input", "output", "lora_A", "lora_B"]))
def test_similarity_is_the_dense_one(pair, of):
    (one, s_one), (two, s_two) = (directions(update, of) for update in pair)
    grid = analysis.subspace_similarity(*pair, of=of)
    assert grid.shape == (one.shape[1], two.shape[1]) and grid.dtype == torch.float64
    at = np.ix_(clusters(s_one), clusters(s_two))
    np.testing.assert_allclose(grid.numpy()[at], similarity(one, two)[at], rtol=0, atol=1e-10)
    assert bool(((grid >= 0) & (grid <= 1)).all())
    torch.testing.assert_close(
        analysis.subspace_similarity(*pair[::-1], of=of), grid.t(), rtol=0, atol=1e-12
    )


@given(factor_pairs())
def test_equal_subspaces_are_similar_by_1_in_any_basis(update):
    grid = analysis.subspace_similarity(update, update)
    torch.testing.assert_close(grid.diagonal(), torch.ones(len(grid)).double())
    torch.manual_seed(1)
    rotation = torch.linalg.qr(torch.randn(update.rank, update.rank).double())[0]
    E = 1 if update.lora_E is None else update.lora_E
    turned = Update(rotation @ (E * update.lora_A), update.lora_B @ rotation.t(), None, 3.0)
    grid = analysis.subspace_similarity(update, turned)
    if update.rank and len(grid):
        ends = clusters(svd(dense(update))[1])
        torch.testing.assert_close(
            grid[ends, ends], torch.ones(len(ends)).double(), rtol=0, atol=1e-10
        )


def test_orthogonal_subspaces_are_similar_by_0():
    eye = torch.eye(6)
    one, two = Update(eye[:2], torch.randn(5, 2)), Update(eye[2:5], torch.randn(7, 3))
    assert analysis.subspace_similarity(one, two, of="lora_A").abs().max() < 1e-15
    assert analysis.subspace_similarity(one, two).abs().max() < 1e-15  # outputs may differ


def test_of_zero_updates_no_direction_is_known():
    zero, one = (
        Update(torch.randn(4, 6), torch.zeros(5, 4)),
        Update(torch.randn(2, 6), torch.randn(5, 2)),
    )
    assert analysis.subspace_similarity(zero, one).shape == (0, 2)
    assert analysis.subspace_similarity(zero, one, of="lora_A").shape == (4, 2)


@given(st.lists(st.floats(0, 1e3), max_size=9))
def test_effective_ranks_are_their_definitions(values):
    s = np.array(sorted(values, reverse=True))
    ranks = analysis.effective_ranks(torch.tensor(values, dtype=torch.float64))
    if not s.any():
        assert ranks == analysis.EffectiveRanks(0, 0, 0, 0, 0)
        return
    s = s / s[0]
    p = s[s > 0] / s.sum()
    assert ranks.entropy == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-10)
    assert ranks.stable == pytest.approx((s**2).sum() / s[0] ** 2, rel=1e-10)
    for part in (90, 95, 99):
        k = getattr(ranks, f"energy_{part}")
        energy = np.cumsum(s**2) / (s**2).sum()
        assert energy[k - 1] >= part / 100 - 1e-12
        assert k == 1 or energy[k - 2] < part / 100


def test_equal_singular_values_all_count():
    ranks = analysis.effective_ranks(torch.full((10,), 0.3))
    assert (ranks.energy_90, ranks.energy_95, ranks.energy_99) == (9, 10, 10)
    assert ranks.entropy == pytest.approx(10) and ranks.stable == pytest.approx(10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_factors_are_taken_as_they_are(dtype):
    update = Update(torch.randn(3, 8).to(dtype), torch.randn(6, 3).to(dtype), None, 0.1)
    found = analysis.delta_spectrum(update)
    assert found.S.dtype == torch.float64
    wanted = torch.linalg.svdvals(update.dense())[:3]
    torch.testing.assert_close(found.S, wanted, rtol=1e-12, atol=0)


def test_layers_are_taken_for_their_adapters():
    layer = rw.nn.AdaLoRALinear(8, 6, rank=4, alpha=8.0)
    torch.nn.init.normal_(layer.lora_E)
    layer.rank = 3
    wanted = 2.0 * layer.lora_B[:, :3] @ (layer.lora_E[:3] * layer.lora_A[:3])
    found = analysis.delta_spectrum(layer)
    torch.testing.assert_close((found.U * found.S) @ found.V.t(), wanted.detach().double())


def test_the_number_of_threads_changes_no_bit():
    pair = [Update(torch.randn(48, 700), torch.randn(900, 48)) for _ in range(2)]
    weight, found = torch.randn(900, 700), []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        grid = analysis.subspace_similarity(*pair)
        spectrum = analysis.delta_spectrum(pair[0])
        found.append((grid, spectrum.U, spectrum.S, analysis.amplification_factor(weight, pair[0])))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0][:3], other[:3], strict=True))
        assert other[3] == found[0][3]


NAN = torch.full((2, 5), float("nan"))
GOOD = Update(torch.ones(2, 5), torch.ones(4, 2))


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: analysis.delta_spectrum(Update(NAN, torch.ones(4, 2), module="a.b")),
            r"delta_spectrum: lora_A of update \('a.b'\) must be finite, got infinite or NaN",
        ),
        (
            lambda: analysis.delta_spectrum(Update(torch.ones(2, 5), torch.ones(4, 3))),
            r"delta_spectrum: lora_B of update must be floating \[any, 2\], got .*\[4, 3\]",
        ),
        (
            lambda: analysis.delta_spectrum(Update(torch.ones(2, 5).int(), torch.ones(4, 2))),
            r"delta_spectrum: lora_A of update must be floating \[any, any\], got .*Int",
        ),
        (
            lambda: analysis.subspace_similarity(GOOD, Update(torch.ones(2, 6), torch.ones(4, 2))),
            "subspace_similarity: second must have 5 features like first, got 6",
        ),
        (
            lambda: analysis.subspace_similarity(GOOD, GOOD, of="A"),
            "subspace_similarity: of must be one of .*, got 'A'",
        ),
        (
            lambda: analysis.effective_ranks(torch.tensor([1.0, -1.0])),
            "effective_ranks: singular_values must not be negative, got -1",
        ),
        (
            lambda: analysis.effective_ranks(torch.ones(2, 2)),
            r"effective_ranks: singular_values must be floating \[any\], got .*\[2, 2\]",
        ),
        (lambda: Update([1.0], torch.ones(2, 2)), "Update: lora_A must be a tensor, got"),
        (
            lambda: analysis.delta_spectrum(
                Update(torch.ones(2, 5, device="meta"), torch.ones(4, 2))
            ),
            "delta_spectrum: lora_A of update must be dense, with data, got .*meta",
        ),
        (
            lambda: analysis.delta_spectrum(
                Update(torch.ones(2, 5), torch.ones(4, 2), scaling=float("inf"))
            ),
            "delta_spectrum: scaling of update must be finite, got inf",
        ),
    ],
)
def test_errors_say_what_was_wanted(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_is_no_update_is_refused():
    with pytest.raises(TypeError, match="delta_spectrum: update must be an Update or a layer"):
        analysis.delta_spectrum(torch.ones(2, 2))
