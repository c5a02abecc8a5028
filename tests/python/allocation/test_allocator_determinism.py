# The same bits for any number of threads, and in every repetition of a whole run.
import os
import subprocess
import sys

import pytest
import torch
from allocation_models import assert_same_state, bench, network, train, trained

STEPS = 8
# More than one chunk of every kind, and many small adapters.
SHAPES = [(700, 300), (31, 900), (900, 31), *[(17, 5)] * 6]
RANKS = [24, 40, 13, *[3] * 6]


def whole_run(dtype: torch.dtype, threads: int):
    """(allocator state, weights, scores of each step)."""
    torch.set_num_threads(threads)
    torch.manual_seed(3)
    b = bench(SHAPES, RANKS, dtype, target_rank=5, total_steps=STEPS, final_steps=2)
    generator = torch.Generator().manual_seed(4)
    found = []
    for _ in range(STEPS):
        for factor in b.factors:
            factor.grad = torch.randn(factor.shape, generator=generator).to(dtype)
            with torch.no_grad():
                factor.add_(torch.randn(factor.shape, generator=generator).to(dtype))
        b.allocator.step(None)
        scores = b.allocator.scores
        found.append(torch.zeros(1, dtype=torch.float64) if scores is None else scores)
    named = {str(i): value for i, value in enumerate(found)}
    return b.allocator.state_dict(), b.model.state_dict(), named


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_one_and_two_threads_give_the_same_bits(dtype):
    one, two = whole_run(dtype, 1), whole_run(dtype, 2)
    for got, wanted in zip(two, one, strict=True):
        assert_same_state(got, wanted)


@pytest.mark.parametrize("form", ["squared_sum", "mean_norm"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_one_and_two_threads_give_the_same_penalty_and_gradients(dtype, form):
    """Or a training with the penalty would keep other directions on another machine."""
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(3)
        b = bench(SHAPES, RANKS, dtype, target_rank=5, total_steps=STEPS)
        b.fill(lambda s: torch.sin(torch.arange(s.numel(), dtype=torch.float64)).view(s), False)
        value = b.allocator.orthogonality_penalty(form)
        value.backward()
        gradients = {str(i): f.grad for i, f in enumerate(b.factors) if f.grad is not None}
        found.append({"value": value.detach(), **gradients})
    assert len(found[0]) == 1 + 2 * len(SHAPES)
    assert_same_state(found[1], found[0])


def test_twenty_repetitions_give_the_same_bits():
    first = whole_run(torch.float32, 2)
    for _ in range(19):
        for got, wanted in zip(whole_run(torch.float32, 2), first, strict=True):
            assert_same_state(got, wanted)


def trained_run():
    model, allocator = network(
        torch.float32, dropout=0.2, total_steps=20, final_steps=4, budget_unit="parameters"
    )
    optimizer = torch.optim.AdamW(trained(model.train()), 0.03)
    allocator.attach(optimizer)
    return train(model, optimizer, range(1, 21)), model.state_dict(), allocator.state_dict()


def test_twenty_trainings_give_the_same_bits():
    first = trained_run()
    for _ in range(19):
        losses, model, allocator = trained_run()
        assert losses == first[0]
        assert_same_state(model, first[1])
        assert_same_state(allocator, first[2])


SCRIPT = """
import hashlib, sys
sys.path[:0] = {path!r}
import torch
from test_allocator_determinism import whole_run
digest = hashlib.sha256()
for part in whole_run(torch.float32, int(sys.argv[1])):
    for name, value in part.items():
        digest.update(name.encode() + value.detach().contiguous().view(-1).numpy().tobytes())
print(digest.hexdigest())
"""


def test_two_processes_give_the_same_bits():
    here = os.path.dirname(__file__)
    script = SCRIPT.format(path=[here, os.path.dirname(here)])
    digests = {
        subprocess.run(
            [sys.executable, "-c", script, threads], capture_output=True, text=True, check=True
        ).stdout
        for threads in "12"
    }
    assert len(digests) == 1
