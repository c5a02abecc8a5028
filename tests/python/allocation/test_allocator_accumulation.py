# Gradients accumulated over several backward passes count as those of one larger batch.
import pytest
import torch
from allocation_models import LAYERS, loss_of, network, trained

OPTIONS = dict(total_steps=10, final_steps=3, warmup_steps=1, allocation_interval=2)


def run(passes: int, batches: int = 4):
    """(scores of each step, averages, ranks); `batches` a step, spread over some passes."""
    model, allocator = network(**OPTIONS)
    optimizer = torch.optim.AdamW(trained(model), 0.01)
    allocator.attach(optimizer)
    scores = []
    for step in range(OPTIONS["total_steps"]):
        optimizer.zero_grad()
        losses = [loss_of(model, batches * step + i) / batches for i in range(batches)]
        for i in range(passes):
            sum(losses[i::passes]).backward()
        optimizer.step()
        if allocator.scores is not None:
            scores.append(allocator.scores)
    assert allocator.steps == OPTIONS["total_steps"] and allocator.frozen
    return scores, allocator.pattern, allocator.ranks


@pytest.mark.parametrize("passes", [2, 4])
def test_micro_batches_are_one_batch(passes):
    (scores, pattern, ranks), (wanted, wanted_pattern, wanted_ranks) = run(passes), run(1)
    for got, expected in zip(scores, wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert ranks == wanted_ranks
    assert all(torch.equal(pattern[name], wanted_pattern[name]) for name in LAYERS)
