# Steps with infinite or NaN gradients change nothing but skipped_steps: 1,000 random patterns.
import math

import numpy as np
import pytest
import torch
from allocation_models import Bench, assert_same_state, bench, copied
from tolerances import assert_same_bits

PATTERNS = 168  # for each of six optimizers
OPTIMIZERS = {
    "adamw plain": lambda p: torch.optim.AdamW(p, 0.05, foreach=False, weight_decay=0.1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 0.05, foreach=True, weight_decay=0.1),
    "adamw fused": lambda p: torch.optim.AdamW(p, 0.05, fused=True, weight_decay=0.1),
    "sgd plain": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, foreach=False),
    "sgd foreach": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, fused=True),
}
BAD = (float("inf"), float("-inf"), float("nan"))
TOTAL, FREEZE = 9, 7


def make(dtype: torch.dtype, name: str, **options) -> tuple[Bench, torch.optim.Optimizer]:
    torch.manual_seed(1)
    options = dict(target_rank=2, total_steps=TOTAL, final_steps=2, warmup_steps=1) | options
    b = bench([(3, 4), (17, 2), (1, 1)], [3, 5, 2], dtype, **options)
    optimizer = OPTIMIZERS[name](b.factors)
    b.allocator.attach(optimizer)
    return b, optimizer


def give(b: Bench, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for factor in b.factors:
        value = torch.randn(factor.shape, generator=generator, dtype=torch.float64)
        factor.grad = value.to(factor.dtype)


def spoil(b: Bench, random: np.random.Generator) -> None:
    """Infinities and NaNs in one element, in some, or in whole gradients."""
    chosen = [f for f in b.factors if random.random() < 0.25]
    for factor in chosen or [b.factors[random.integers(len(b.factors))]]:
        flat = factor.grad.view(-1)
        if random.random() < 0.5:
            flat[random.integers(flat.numel())] = random.choice(BAD)
        elif random.random() < 0.5:
            flat[random.integers(flat.numel()) :] = random.choice(BAD)
        else:
            flat.fill_(random.choice(BAD))


def bad_step(b: Bench, optimizer, random: np.random.Generator) -> None:
    """A spoilt step, after which weights and optimizer are put back as one would from a backup."""
    weights, moments = copied(b.model.state_dict()), copied(optimizer.state_dict())
    before, history = b.allocator.state_dict(), len(b.allocator.history)
    skipped, ranks = b.allocator.skipped_steps, [layer.rank for layer in b.layers]
    spoil(b, random)
    optimizer.step()
    after = b.allocator.state_dict()
    assert_same_state(after, before, ignoring=["skipped_steps"])
    assert b.allocator.skipped_steps == skipped + 1 == after["skipped_steps"].item()
    assert len(b.allocator.history) == history
    assert [layer.rank for layer in b.layers] == ranks
    b.model.load_state_dict(weights)
    optimizer.load_state_dict(moments)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_random_bad_steps_leave_no_trace(name):
    random = np.random.default_rng(len(name))
    twins = {}
    for dtype in (torch.float64, torch.float32):
        twin, optimizer = make(dtype, name)
        for step in range(1, TOTAL + 1):
            give(twin, step)
            optimizer.step()
        twins[dtype] = twin
    for pattern in range(PATTERNS):
        dtype = (torch.float64, torch.float32)[pattern % 2]
        b, optimizer = make(dtype, name)
        bad = {int(s) for s in random.integers(1, FREEZE + 1, 2)}
        for step in range(1, TOTAL + 1):
            if step in bad:
                give(b, step)
                bad_step(b, optimizer, random)
            give(b, step)
            optimizer.step()
        twin = twins[dtype]
        got, wanted = b.allocator.state_dict(), twin.allocator.state_dict()
        assert_same_state(got, wanted, ignoring=["skipped_steps"])
        assert b.allocator.skipped_steps == len(bad) and b.allocator.steps == TOTAL
        assert_same_state(b.model.state_dict(), twin.model.state_dict())


@pytest.mark.parametrize("place", range(9))
@pytest.mark.parametrize("value", BAD)
def test_one_element_of_any_factor_anywhere(place, value):
    """Every element of small and large tensors, past vectors and chunks of 8192."""
    b = bench([(37, 5), (6, 4099), (1, 1)], [3, 3, 1], torch.float32, total_steps=5, target_rank=1)
    give(b, 1)
    b.allocator.step(None)
    before = b.allocator.state_dict()
    flat = b.factors[place].grad.view(-1)
    positions = range(flat.numel()) if flat.numel() < 200 else [0, 15, 16, 8191, 8192, -17, -2, -1]
    for count, i in enumerate(positions, start=1):
        old, flat[i] = flat[i].item(), value
        b.allocator.step(None)
        flat[i] = old
        assert b.allocator.skipped_steps == count, f"element {i}"
    assert_same_state(b.allocator.state_dict(), before, ignoring=["skipped_steps"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_products_that_overflow_are_no_reason_to_skip_nor_ever_nan(dtype):
    """Finite gradients of huge, infinite and NaN weights: averages stay finite, scores ordered."""
    b = bench([(4, 4), (3, 2)], [3, 3], dtype, total_steps=7, target_rank=1, shrink=False)
    largest = torch.finfo(dtype).max
    for step in range(1, 7):
        give(b, step)
        b.fill(torch.ones, gradients=False)
        for value, row in zip((largest, float("inf"), float("nan")), range(3), strict=True):
            with torch.no_grad():
                b.layers[0].lora_A[row, 1] = value if step == 2 else 1.0
        b.layers[0].lora_A.grad[0] = largest
        b.allocator.step(None)
        state = b.allocator.state_dict()
        averages = [v for k, v in state.items() if "sensitivity" in k or "uncertainty" in k]
        assert all(torch.isfinite(average).all() for average in averages), f"step {step}"
        assert not b.allocator.scores.isnan().any(), f"step {step}"
    assert b.allocator.skipped_steps == 0 and b.allocator.steps == 6
    assert sum(b.allocator.ranks.values()) == b.allocator.schedule.budget(6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_zero_do_not_hide_a_bad_gradient(dtype):
    b = bench([(4, 4)], [3], dtype, total_steps=5, target_rank=1)
    for value in BAD:
        b.fill(torch.zeros, gradients=False)
        give(b, 1)
        b.layers[0].lora_A.grad[1, 2] = value
        b.allocator.step(None)
    assert b.allocator.skipped_steps == 3 and b.allocator.steps == 0


def test_a_bad_step_at_the_freeze_only_delays_it():
    b, optimizer = make(torch.float64, "adamw plain")
    for step in range(1, FREEZE):
        give(b, step)
        optimizer.step()
    random = np.random.default_rng(0)
    give(b, FREEZE)
    bad_step(b, optimizer, random)
    assert not b.allocator.frozen and b.allocator.steps == FREEZE - 1
    give(b, FREEZE)
    optimizer.step()
    assert b.allocator.frozen and b.allocator.steps == FREEZE
    assert b.allocator.history[-1].step == FREEZE


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_without_a_skip_the_infinity_would_have_stayed():
    """The test above can fail: the oracle that takes the step never recovers."""
    b = bench([(3, 4)], [3], total_steps=5, target_rank=1)
    oracle = b.oracle()
    give(b, 1)
    b.layers[0].lora_A.grad[0, 0] = float("inf")
    oracle.step(b.numpy(False), b.numpy(True))
    assert not np.isfinite(oracle.scores()).all()
    assert_same_bits(b.allocator.scores, torch.zeros(3, dtype=torch.float64), "scores")


@pytest.mark.parametrize("scores, kept", [
    ([math.nan, 1.0, math.nan, 3.0], [1, 3]),
    ([2.0, math.nan, math.inf, -math.inf], [0, 2]),
    ([math.nan, math.nan, math.nan, -math.inf], [0, 3]),
    ([math.nan] * 20 + [1.0] * 2 + [math.nan] * 20, [20, 21]),
])  # fmt: skip
def test_averages_that_overflowed_are_the_least(scores, kept):
    found = torch.zeros(len(scores), dtype=torch.bool)
    scores = torch.tensor(scores, dtype=torch.float64)
    chosen = torch.tensor([1, 0, 2, 1, 0, 0])  # a step with a budget of two directions
    torch.ops.rankwise._select_triplets_(found, scores, [len(scores)], [1], 0, chosen)
    assert found.nonzero().squeeze(1).tolist() == kept
