# Under torch.amp.GradScaler: scores are of unscaled gradients, overflown steps leave no trace.
import warnings

import pytest
import torch
from allocation_models import assert_same_state, copied, loss_of, network, trained
from torch.amp import GradScaler

OPTIMIZERS = {
    "adamw plain": lambda p: torch.optim.AdamW(p, 0.02, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 0.02, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, 0.02, fused=True),
    "adam fused": lambda p: torch.optim.Adam(p, 0.02, fused=True),
    "sgd plain": lambda p: torch.optim.SGD(p, 0.2, momentum=0.9, foreach=False),
    "sgd fused": lambda p: torch.optim.SGD(p, 0.2, momentum=0.9, fused=True),
    "sgd fused without momentum": lambda p: torch.optim.SGD(p, 0.2, fused=True),
    "adagrad fused": lambda p: torch.optim.Adagrad(p, 0.1, fused=True),
}
OVERFLOWS = (1, 4, 5, 9, 10, 13)  # the first step, allocations, the freeze, after it
# Adagrad takes no scale: the scaler treats it as a plain one.
FUSED = [name for name in OPTIMIZERS if "fused" in name and "adagrad" not in name]
TOTAL = 14


def overflows_for(name: str) -> tuple[int, ...]:
    """torch 2.11's fused SGD never initialises the momentum when its first step overflows."""
    return OVERFLOWS[1:] if name == "sgd fused" else OVERFLOWS


def run(name: str, *, scaled: bool, overflows=(), unscale: bool = False):
    """(model, allocator, losses, scores after each step) of a float32 run."""
    model, allocator = network(
        torch.float32, total_steps=TOTAL, final_steps=4, warmup_steps=2, allocation_interval=2
    )
    optimizer = OPTIMIZERS[name](trained(model))
    allocator.attach(optimizer)
    scaler = GradScaler("cpu", init_scale=2.0**20, growth_interval=3, enabled=scaled)
    losses, scores = [], []

    def one_step(step: int, overflow: bool) -> float:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        scaler.scale(loss).backward()
        if overflow:
            model.second.lora_B.grad[2, 1] = float("inf")
        if unscale:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(trained(model), 1e9, foreach=False)
        scaler.step(optimizer)
        scaler.update()
        return loss.item()

    for step in range(1, TOTAL + 1):
        if step in overflows:
            weights, before = copied(model.state_dict()), allocator.state_dict()
            ranks, scale = dict(allocator.ranks), scaler.get_scale()
            one_step(step, overflow=True)
            assert scaler.get_scale() < scale, "the scaler saw no overflow"
            assert_same_state(model.state_dict(), weights)
            assert_same_state(allocator.state_dict(), before, ignoring=["skipped_steps"])
            assert allocator.ranks == ranks
        losses.append(one_step(step, overflow=False))
        scores.append(allocator.scores)
    return model, allocator, losses, scores


def assert_equal_runs(got, wanted) -> None:
    """Powers of two scale exactly: every bit is the same."""
    assert got[2] == wanted[2]
    for a, b in zip(got[3], wanted[3], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert_same_state(got[0].state_dict(), wanted[0].state_dict())
    assert_same_state(got[1].state_dict(), wanted[1].state_dict(), ignoring=["skipped_steps"])


@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscaled before"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scores_are_of_unscaled_gradients(name, unscale):
    wanted = run(name, scaled=False)
    got = run(name, scaled=True, unscale=unscale)
    assert wanted[3][3].min() > 0 and got[1].skipped_steps == 0
    assert_equal_runs(got, wanted)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_overflown_steps_leave_no_trace(name):
    wanted = run(name, scaled=False)
    got = run(name, scaled=True, overflows=overflows_for(name))
    assert got[1].steps == TOTAL
    assert_equal_runs(got, wanted)


@pytest.mark.parametrize("name", FUSED)
def test_fused_optimizers_steps_left_out_are_counted(name):
    """Plain optimizers are not called at all by the scaler, so nothing is there to count."""
    overflows = overflows_for(name)
    assert run(name, scaled=True, overflows=overflows)[1].skipped_steps == len(overflows)
    plain = name.replace("fused", "plain").removesuffix(" without momentum")
    if plain in OPTIMIZERS:
        assert run(plain, scaled=True, overflows=OVERFLOWS)[1].skipped_steps == 0


def test_found_inf_by_hand():
    """What step() reads from the optimizer: not zero means that the weights were left alone."""
    model, allocator = network(total_steps=5)
    optimizer = torch.optim.SGD(trained(model), 0.1)
    loss_of(model, 1).backward()
    for found, skipped in ((1.0, 1), (0.0, 1), (2.0, 2)):
        optimizer.found_inf = torch.tensor(found)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            allocator.step(optimizer)
        assert allocator.skipped_steps == skipped
    assert allocator.steps == 1
