# 10,000 steps of random small runs beside the oracle: scores, masks, E, ranks and history.
import math

import numpy as np
import pytest
import torch
from allocation_models import LETTERS, Bench, bench
from allocation_oracle import Oracle
from torch import nn

import rankwise as rw

STEPS = 10_000
BLOCKS = 10
KINDS = ("normal", "normal", "sparse", "repeated", "integers")
WIDTHS = {"integers": (1, 2, 4, 8)}  # sums and means exact, so that ties are ties
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def random_bench(random: np.random.Generator, kind: str) -> Bench:
    count = int(random.integers(1, 7))
    widths = WIDTHS.get(kind, range(1, 10))
    shapes = [tuple(int(w) for w in random.choice(widths, 2)) for _ in range(count)]
    if kind == "repeated":
        shapes = shapes[:1] * count
    ranks = [int(r) for r in random.integers(1, 7, count)]
    target = int(random.integers(0, max(ranks) + 1))
    total = int(random.integers(8, 11) if kind == "integers" else random.integers(1, 45))
    warmup = int(random.integers(0, max(total // 2, 1)))
    betas = (0.5, 0.75) if kind == "integers" else (random.choice((0.85, 0.3)), random.random())
    mixed = kind == "normal" and random.random() < 0.4
    return bench(
        shapes,
        ranks,
        [DTYPES[random.integers(3)] for _ in shapes] if mixed else torch.float64,
        target_rank=target,
        total_steps=total,
        warmup_steps=warmup,
        final_steps=int(random.integers(0, min(6, total - warmup))),
        allocation_interval=int(random.choice((1, 1, 2, 3, 7, 50))),
        beta1=float(betas[0]),
        beta2=float(betas[1]),
        budget_unit=str(random.choice(("triplets", "parameters"))),
        min_rank=int(random.integers(0, target + 1)) if random.random() < 0.4 else 0,
        shrink=bool(random.random() < 0.5),
    )


def write(b: Bench, random: np.random.Generator, kind: str) -> None:
    """A step's weights and gradients, as an optimizer would leave them."""

    def numbers(shape: torch.Size) -> torch.Tensor:
        if kind == "integers":
            return torch.from_numpy(random.integers(-1, 2, shape).astype(float))
        if kind == "repeated":  # the same for all directions of all adapters
            return torch.full(shape, float(next(repeated)), dtype=torch.float64)
        values = random.standard_normal(shape)
        return torch.from_numpy(values * (random.random(shape) < 0.3 if kind == "sparse" else 1))

    repeated = iter(np.tile(random.standard_normal(3), len(b.layers)))
    b.fill(numbers, gradients=False)
    repeated = iter(np.tile(random.standard_normal(3), len(b.layers)))
    b.fill(numbers, gradients=True)
    if kind == "sparse" and random.random() < 0.1:
        b.fill(torch.zeros, gradients=True)


def step_beside(b: Bench, oracle: Oracle, what: str) -> None:
    """One step of both, with every visible result compared."""
    gradients = b.numpy(True)
    before = b.numpy(False)
    shrunk_before = oracle.frozen and b.config.shrink
    b.allocator.step(None)
    masked = oracle.step(before, gradients)
    shrunk = oracle.frozen and b.config.shrink
    for m, (layer, kept) in enumerate(zip(b.layers, oracle.pattern(), strict=True)):
        wanted = dict(before[m])
        if masked and not shrunk_before:
            wanted["E"] = np.where(kept[:, None], wanted["E"], 0.0)
        if shrunk and not shrunk_before:
            for k, axis in {"A": 0, "B": 1, "E": 0}.items():
                order = np.concatenate([np.flatnonzero(kept), np.flatnonzero(~kept)])
                wanted[k] = np.take(wanted[k], order, axis)
                np.moveaxis(wanted[k], axis, 0)[kept.sum() :] = 0
        for k, name in LETTERS.items():
            got = getattr(layer, name).detach().double().cpu().numpy()
            assert np.array_equal(got, wanted[k]), f"{what}: {name} of {m}: {got} not {wanted[k]}"
        assert np.array_equal(b.allocator.pattern[str(m)].cpu().numpy(), kept), (
            f"{what}: pattern of {m}"
        )
        assert layer.rank == (kept.sum() if shrunk else len(kept)), f"{what}: rank of {m}"
    assert list(b.allocator.ranks.values()) == oracle.ranks(), what
    assert b.allocator.steps == oracle.steps and b.allocator.frozen == oracle.frozen, what
    if oracle.frozen:
        assert b.allocator.scores is None, what
    else:
        got, wanted = b.allocator.scores.cpu().numpy(), oracle.scores()
        assert np.all(np.abs(got - wanted) <= 1e-12 * wanted), f"{what}: {got} not {wanted}"


def assert_same_history(b: Bench, oracle: Oracle, what: str) -> None:
    assert len(b.allocator.history) == len(oracle.history), what
    for got, wanted in zip(b.allocator.history, oracle.history, strict=True):
        for name in ("step", "budget", "ranks"):
            assert getattr(got, name) == wanted[name], f"{what}: history's {name}"
        for name in ("mean_score", "largest_score", "lowest_kept", "highest_pruned"):
            a, z = getattr(got, name), wanted[name]
            same = math.isnan(a) == math.isnan(z) and (math.isnan(a) or abs(a - z) <= 1e-12 * z)
            assert same, f"{what}: history's {name} {a}, not {z}"


@pytest.mark.parametrize("block", range(BLOCKS))
@pytest.mark.filterwarnings("ignore:.*all gradients are zero")
def test_random_runs(block):
    random, steps, run = np.random.default_rng(block), 0, 0
    while steps < STEPS // BLOCKS:
        run += 1
        kind = KINDS[run % len(KINDS)]
        b = random_bench(random, kind)
        what = f"block {block}, run {run} ({kind}): {b.config}"
        oracle = b.oracle()
        for step in range(1, b.config.total_steps + 3):
            write(b, random, kind)
            step_beside(b, oracle, f"{what}, step {step}")
        steps += step
        assert_same_history(b, oracle, what)
        schedule = b.allocator.schedule
        for t in range(1, b.config.total_steps + 3):
            wanted = oracle.options.budget(t, oracle.initial, oracle.final)
            assert schedule.budget(t) == wanted and schedule.allocates(
                t
            ) == oracle.options.allocates(t), f"{what}: schedule at {t}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_16_and_32_bit_weights_have_averages_that_do_not_underflow(dtype):
    b = bench([(5, 4), (3, 6)], [4, 3], dtype, target_rank=1, total_steps=20, final_steps=2)
    oracle, random = b.oracle(), np.random.default_rng(3)
    for step in range(1, 21):
        b.fill(lambda s: torch.from_numpy(random.standard_normal(s)), gradients=False)
        b.fill(lambda s: torch.from_numpy(1e-4 * random.standard_normal(s)), gradients=True)
        step_beside(b, oracle, f"{dtype}, step {step}")
    assert sum(b.allocator.ranks.values()) == 2
    assert 0 < oracle.history[-1]["largest_score"] < 1e-7  # float16 alone would underflow


def test_wide_layers_pass_several_chunks():
    """Sums of more than one vector and more than one chunk of 8192 elements."""
    b = bench([(3001, 17), (19, 2999)], [7, 5], target_rank=2, total_steps=6)
    oracle, random = b.oracle(), np.random.default_rng(5)
    for step in range(1, 7):
        write(b, random, "normal")
        step_beside(b, oracle, f"step {step}")


def test_storage_beyond_the_rank_takes_no_part():
    ranks = (3, 5)
    layers = nn.ModuleList(
        rw.nn.AdaLoRALinear(4, 5, rank=r, capacity=8, dtype=torch.float64) for r in ranks
    )
    config = rw.AdaLoRAConfig(target_modules=["0"], initial_rank=5, target_rank=2, total_steps=4)
    b = Bench(layers, config, rw.RankAllocator(layers, config))
    oracle, random = b.oracle(), np.random.default_rng(9)

    def active(arrays):
        return [
            {"A": x["A"][:r], "B": x["B"][:, :r], "E": x["E"][:r]}
            for x, r in zip(arrays, ranks, strict=True)
        ]

    for step in range(1, 5):
        write(b, random, "normal")
        oracle.step(active(b.numpy(False)), active(b.numpy(True)))
        beyond = [layer.lora_E[r:].clone() for layer, r in zip(layers, ranks, strict=True)]
        b.allocator.step(None)
        for layer, old, rank in zip(layers, beyond, ranks, strict=True):
            assert torch.equal(layer.lora_E[rank:], old)
        if step < 4:
            np.testing.assert_allclose(b.allocator.scores, oracle.scores(), rtol=1e-12)
    assert torch.cat(list(b.allocator.pattern.values())).tolist() == oracle.kept.tolist()
    assert [layer.rank for layer in layers] == oracle.ranks()


def test_gradients_of_any_strides():
    b = bench([(5, 4), (3, 6)], [4, 3], target_rank=1, total_steps=9)
    oracle, random = b.oracle(), np.random.default_rng(3)
    for step in range(1, 10):
        write(b, random, "normal")
        for i, factor in enumerate(b.factors):
            if i % 2:
                factor.grad = factor.grad.t().contiguous().t()
            else:
                factor.grad = factor.grad.repeat(2, 3)[::2, : factor.shape[1]]
        step_beside(b, oracle, f"step {step}")
