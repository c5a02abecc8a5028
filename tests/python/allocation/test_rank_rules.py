# examples/rank_rules.py: other methods' rules in a SpectralAllocator.
import importlib.util
from pathlib import Path

import pytest
import torch
from spectral_models import SHAPES, cost_of, spectral, train, trained

PATH = Path(__file__).resolve().parents[3] / "examples" / "rank_rules.py"
_spec = importlib.util.spec_from_file_location("rank_rules", PATH)
rank_rules = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(rank_rules)

RULES = {
    "increlora": dict(rule=rank_rules.increlora(), initial_budget=400),
    "elalora": dict(rule=rank_rules.elalora(moved=2), min_age=0),
    "growing": dict(
        rule=rank_rules.growing(), initial_budget=222, initial_rank=0, min_rank=0, max_rank=6,
        alpha=2.0, warmup_steps=0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_a_training_with_it(name):
    model, allocator = spectral(**dict(total_steps=160, final_steps=60) | RULES[name])
    first = dict(allocator.ranks)
    optimizer = torch.optim.AdamW(trained(model), 0.02)
    allocator.attach(optimizer)
    losses = train(model, optimizer, range(160))
    assert losses[-1] < 0.5 * losses[0]
    assert cost_of(model) + allocator.bank == allocator.budget
    if name == "elalora":
        assert allocator.ranks != first and sum(e.dropped for e in allocator.history) > 0
    else:  # they only grow
        assert sum(e.dropped for e in allocator.history) == 0
        assert all(allocator.ranks[n] >= first[n] for n in SHAPES)
        assert sum(allocator.ranks.values()) > sum(first.values())
