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


def progress(budget: int, updates: int = 1, steps: int = 1, recorded: int = 0) -> torch.Tensor:
    """A step that chooses with this budget, or not at all (csrc/kernels/progress.h)."""
    return torch.tensor([steps, 0, budget, updates, 0, recorded])


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
    if not score:
        return
    torch.testing.assert_close(scores.cpu(), expected, rtol=1e-13, atol=0)
    again = ops._importance_step_(
        device[0], [None] * len(lists[0]), *device[2:], ranks, 0.85, 0.8, score
    )
    assert torch.equal(again, scores)


@pytest.mark.parametrize("budget, updates", [(-1, 0), (-1, 1), (7, 0), (7, 1)])
def test_progress_says_whether_averages_change(budget, updates):
    *lists, ranks = state(torch.float32)
    device, before = [moved(tensors) for tensors in lists], moved(lists[2] + lists[3])
    now = progress(budget, updates)
    expected = ops._importance_step_(*lists, ranks, 0.85, 0.8, True, now)
    scores = ops._importance_step_(*device, ranks, 0.85, 0.8, True, now.to(DEVICE))
    for theirs, ours, old in zip(lists[2] + lists[3], device[2] + device[3], before, strict=True):
        assert torch.equal(theirs, ours.cpu())
        assert updates or torch.equal(ours, old)
    if budget >= 0:
        torch.testing.assert_close(scores.cpu(), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("found", [None, (False, True), (False, False), (True, True)])
@pytest.mark.parametrize("inf", [None, 0.0, 1.0, math.nan])
@pytest.mark.parametrize("steps", [0, 2, 3, 9])
def test_the_schedule_is_the_cpus(found, inf, steps):
    budgets = torch.tensor([-1, -1, 9, -1, 5])
    facts = None if found is None else torch.tensor(found)
    for dtype in DTYPES:
        flag = None if inf is None else torch.tensor(inf, dtype=dtype)
        arguments = [progress(0, steps=steps), facts, flag, budgets]
        device = moved(arguments)
        expected = ops._schedule_step(*arguments, 4)
        assert torch.equal(ops._schedule_step(*device, 4).cpu(), expected)


def test_the_history_is_the_cpus():
    ranks = torch.randint(0, 40, (300,)).tolist()
    history = [torch.zeros(9, 302, dtype=torch.long), torch.zeros(9, 4, dtype=torch.float64)]
    device, recorded = moved(history), 0
    for step, budget in enumerate([5, 5, -1, 4, 4, 3], 1):
        now = progress(budget, steps=step, recorded=recorded)
        scores, kept = torch.rand(sum(ranks), dtype=torch.float64), torch.rand(sum(ranks)) < 0.5
        on_device = moved([now, scores, kept])
        ops._record_choice_(*history, now, scores, kept, ranks, 6)
        ops._record_choice_(*device, *on_device, ranks, 6)
        recorded = int(now[5])
        assert torch.equal(on_device[0].cpu(), now)
    for theirs, ours in zip(history, device, strict=True):
        assert torch.equal(theirs[:recorded], ours[:recorded].cpu())


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
        assert_same_choice(scores, ranks, costs, int(torch.randint(0, 10000, ())))


def test_the_choice_among_many():
    assert_same_choice(torch.rand(30000, dtype=torch.float64), [30000], [1], 9000)


def test_no_choice_leaves_the_pattern():
    kept = torch.tensor([True, False, True], device=DEVICE)
    scores = torch.rand(3, dtype=torch.float64, device=DEVICE)
    ops._select_triplets_(kept, scores, [3], [1], 1, progress(-1).to(DEVICE))
    assert kept.tolist() == [True, False, True]


def assert_same_choice(scores, ranks, costs, budget: int) -> None:
    kept, now = torch.zeros(len(scores), dtype=torch.bool), progress(budget)
    found = kept.to(DEVICE)
    ops._select_triplets_(kept, scores, ranks, costs, 2, now)
    ops._select_triplets_(found, scores.to(DEVICE), ranks, costs, 2, now.to(DEVICE))
    assert torch.equal(found.cpu(), kept)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("budget", [-1, 0])
def test_masks(dtype, budget):
    ranks = [3, 0, 150]
    kept = torch.rand(153) < 0.5
    lists = [torch.ones(rank + 1, 1, dtype=dtype) for rank in ranks]
    device = moved(lists)
    now = progress(budget)
    ops._mask_triplets_(lists, ranks, kept, now)
    ops._mask_triplets_(device, ranks, kept.to(DEVICE), now.to(DEVICE))
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
