"""AdaLoRA's passes on a GPU against the CPU's: averages and masks bit-equal, sums close."""

import math

import pytest
import torch

from rankwise._library import library

if not torch.cuda.is_available() or not library.cuda:
    pytest.skip("needs a GPU and rankwise's CUDA side", allow_module_level=True)

DEVICE = "cuda"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(7, 5, 3), (33, 1, 4), (1, 17, 1), (9000, 70, 5), (6, 6, 0), (40, 4100, 13)]
ops = torch.ops.rankwise


def moved(tensors):
    return [None if tensor is None else tensor.to(DEVICE, copy=True) for tensor in tensors]


def state(dtype):
    """Parameters, gradients (some missing), averages of each kind and ranks."""
    average = torch.float64 if dtype == torch.float64 else torch.float32
    sizes = [
        size for i, o, r in SHAPES for size in ((r, i), (o, r), (r, 1))
    ]  # A, B, E of each adapter
    gradients = [torch.randn(size).to(dtype) for size in sizes]
    gradients[6] = None
    return (
        [torch.randn(size).to(dtype) for size in sizes],
        gradients,
        [torch.rand(size, dtype=average) for size in sizes],
        [torch.rand(size, dtype=average) for size in sizes],
        [rank for _, _, rank in SHAPES],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", [False, True])
def test_averages_have_the_cpus_bits(dtype, score):
    *lists, ranks = state(dtype)
    device = [moved(tensors) for tensors in lists]
    expected = ops._importance_step_(*lists, ranks, 0.85, 0.8, score)
    scores = ops._importance_step_(*device, ranks, 0.85, 0.8, score)
    for theirs, ours in zip(lists[2] + lists[3], device[2] + device[3], strict=True):
        assert torch.equal(theirs, ours.cpu())
    torch.testing.assert_close(scores.cpu(), expected, rtol=1e-13, atol=0)
    again = ops._importance_step_(
        device[0], [None] * len(lists[0]), *device[2:], ranks, 0.85, 0.8, score
    )
    assert torch.equal(again, scores)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_check_finds_one_element(dtype):
    gradients = [
        torch.zeros(3, 5, dtype=dtype, device=DEVICE),
        torch.zeros(20000, dtype=dtype, device=DEVICE),
    ]
    assert ops._importance_check(gradients).tolist() == [False, False]
    gradients[1][19999] = -1e-7
    assert ops._importance_check(gradients).tolist() == [False, True]
    for bad in (math.inf, -math.inf, math.nan):
        gradients[1][19999] = bad
        assert ops._importance_check(gradients).tolist() == [True, True]


@pytest.mark.parametrize("values", [3, 10**6])
def test_the_choice_is_the_cpus(values):
    for _ in range(50):
        ranks = torch.randint(0, 40, (12,)).tolist()
        costs = torch.randint(1, 100, (12,)).tolist()
        scores = torch.randint(0, values, (sum(ranks),)).double()
        budget = int(torch.randint(0, 10000, ()))
        expected = ops._select_triplets(scores, ranks, costs, budget, 2)
        assert torch.equal(
            ops._select_triplets(scores.to(DEVICE), ranks, costs, budget, 2).cpu(), expected
        )


def test_more_triplets_than_the_kernel_takes():
    scores, ranks, costs = torch.rand(17000, dtype=torch.float64), [17000], [1]
    expected = ops._select_triplets(scores, ranks, costs, 9000, 0)
    kept = ops._select_triplets(scores.to(DEVICE), ranks, costs, 9000, 0)
    assert kept.device.type == DEVICE
    assert torch.equal(kept.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["cpu", DEVICE])
def test_masks(dtype, where):
    ranks = [3, 0, 150]
    kept = torch.rand(153) < 0.5
    lists = [torch.ones(rank + 1, 1, dtype=dtype) for rank in ranks]
    device = moved(lists)
    ops._mask_triplets_(lists, ranks, kept)
    ops._mask_triplets_(device, ranks, kept.to(where))
    assert all(torch.equal(a, b.cpu()) for a, b in zip(lists, device, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("squared", [False, True])
def test_the_orthogonality_penalty_and_its_gradient(dtype, squared):
    ranks = [3, 0, 12, 70]
    capacities = [5, 2, 12, 71]
    A = [torch.randn(c, 300).div(17).to(dtype) for c in capacities]
    B = [torch.randn(130, c).div(11).to(dtype) for c in capacities]
    results = []
    for device in ("cpu", DEVICE):
        factors = [t.to(device).requires_grad_() for t in A + B]
        value = ops.orthogonality_penalty(factors[:4], factors[4:], ranks, squared)
        gradients = torch.autograd.grad(value, factors)
        results.append([value.detach().cpu(), *(g.cpu() for g in gradients)])
    tolerance = {
        torch.float64: 1e-12,
        torch.float32: 1e-5,
        torch.bfloat16: 1e-2,
        torch.float16: 2e-3,
    }
    for expected, found in zip(*results, strict=True):
        bound = tolerance[dtype] * max(
            1.0, float(expected.abs().max()) if expected.numel() else 1.0
        )
        torch.testing.assert_close(found, expected, rtol=tolerance[dtype], atol=bound)


def test_two_devices_are_refused():
    factors = [torch.randn(2, 4, device=DEVICE), torch.randn(2, 4)]
    others = [torch.randn(4, 2, device=DEVICE), torch.randn(4, 2)]
    with pytest.raises(RuntimeError, match="all factors must be on one device"):
        ops.orthogonality_penalty(factors, others, [2, 2], True)
