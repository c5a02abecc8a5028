# Exactly the budget is kept where it is delicate: ties, no pruning, target 0, parameters, min_rank.
import pytest
import torch
from allocation_models import Bench, bench, normal

SHAPES = [(3, 4), (7, 2), (1, 1), (5, 5)]
RANKS = [6, 4, 3, 5]


def run(b: Bench, gradient, check) -> None:
    """The whole schedule with random weights; check(kept per layer, step) after each step."""
    random = normal(2)
    for step in range(1, b.config.total_steps + 1):
        b.fill(random, gradients=False)
        b.fill(gradient, gradients=True)
        b.allocator.step(None)
        check(list(b.allocator.ranks.values()), step)


@pytest.mark.parametrize("target", [0, 1, 3, 6])
@pytest.mark.filterwarnings("ignore:.*all gradients are zero")
def test_equal_scores_keep_the_budget_and_the_first_directions(target):
    b = bench(SHAPES, RANKS, target_rank=target, total_steps=15, final_steps=3, shrink=False)

    def check(ranks, step):
        if b.allocator.schedule.allocates(step):
            budget = b.allocator.schedule.budget(step)
            assert sum(ranks) == budget
            flat = torch.cat(list(b.allocator.pattern.values()))
            assert flat[:budget].all() and not flat[budget:].any()

    run(b, torch.zeros, check)
    assert sum(b.allocator.ranks.values()) == sum(min(r, target) for r in RANKS)


@pytest.mark.parametrize("unit", ["triplets", "parameters"])
def test_budget_equal_to_the_initial_one_prunes_nothing(unit):
    b = bench(SHAPES, RANKS, target_rank=6, total_steps=12, budget_unit=unit)
    run(b, normal(3), lambda ranks, step: None)
    assert list(b.allocator.ranks.values()) == RANKS and b.allocator.frozen
    assert all(layer.rank == r for layer, r in zip(b.layers, RANKS, strict=True))


@pytest.mark.parametrize("unit", ["triplets", "parameters"])
def test_target_0_empties_every_module(unit):
    b = bench(SHAPES, RANKS, target_rank=0, total_steps=12, budget_unit=unit)
    run(b, normal(3), lambda ranks, step: None)
    assert list(b.allocator.ranks.values()) == [0] * 4
    assert all(layer.rank == 0 for layer in b.layers)
    assert not any(factor.any() for factor in b.factors)
    x, layer = torch.ones(2, 3, dtype=torch.float64), b.layers[0]
    y = layer(x)
    assert torch.equal(y, torch.nn.functional.linear(x, layer.weight, layer.bias))
    layer.zero_grad()
    y.sum().backward()
    assert not layer.lora_A.grad.any() and not layer.lora_E.grad.any()


@pytest.mark.parametrize("seed", range(5))
def test_triplets_kept_are_the_budget_exactly(seed):
    b = bench(SHAPES, RANKS, target_rank=2, total_steps=25, warmup_steps=3, final_steps=4)

    def check(ranks, step):
        if step <= 3:
            assert ranks == RANKS
        else:
            assert sum(ranks) == b.allocator.schedule.budget(step)

    run(b, normal(seed), check)


@pytest.mark.parametrize("seed", range(5))
def test_parameters_kept_never_exceed_the_budget_nor_leave_room(seed):
    costs = [sum(shape) for shape in SHAPES]
    b = bench(SHAPES, RANKS, target_rank=2, total_steps=25, budget_unit="parameters")
    assert b.allocator.schedule.initial_budget == sum(
        r * c for r, c in zip(RANKS, costs, strict=True)
    )
    assert b.allocator.schedule.final_budget == 2 * sum(costs)

    def check(ranks, step):
        kept = sum(r * c for r, c in zip(ranks, costs, strict=True))
        left = b.allocator.schedule.budget(step) - kept
        assert left >= 0
        pruned = [c for r, c, most in zip(ranks, costs, RANKS, strict=True) if r < most]
        assert all(c > left for c in pruned), "a pruned direction would have fitted"

    run(b, normal(seed), check)


@pytest.mark.parametrize("unit", ["triplets", "parameters"])
def test_min_rank_goes_before_scores(unit):
    b = bench(
        SHAPES, RANKS, target_rank=2, min_rank=2, total_steps=20, budget_unit=unit, shrink=False
    )

    def only_the_first(shape):
        return normal(1)(shape) * (100.0 if 3 in shape or 4 in shape else 1e-6)

    run(b, only_the_first, lambda ranks, step: None)
    assert list(b.allocator.ranks.values()) == [2, 2, 2, 2]  # min_rank leaves nothing to choose
    free = bench(SHAPES, RANKS, target_rank=2, total_steps=20, budget_unit=unit, shrink=False)
    run(free, only_the_first, lambda ranks, step: None)
    assert min(free.allocator.ranks.values()) < 2  # and without it the weak module loses


def test_min_rank_keeps_the_best_of_a_module():
    b = bench([(2, 2), (2, 2)], [4, 4], target_rank=1, min_rank=1, total_steps=6)
    strong = torch.tensor([1.0, 2.0, 3.0, 9.0], dtype=torch.float64)

    def gradient(shape):
        along = strong if shape[-1] == 4 else strong[:, None]
        return along.expand(shape).clone()

    random = torch.ones
    for _ in range(6):
        b.fill(random, gradients=False)
        b.fill(gradient, gradients=True)
        b.layers[1].lora_A.grad.mul_(1e-5)
        b.layers[1].lora_B.grad.mul_(1e-5)
        b.layers[1].lora_E.grad.mul_(1e-5)
        b.allocator.step(None)
    assert [kept.tolist() for kept in b.allocator.pattern.values()] == [[False] * 3 + [True]] * 2
