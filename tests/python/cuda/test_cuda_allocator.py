# AdaLoRA's allocator over parameters on CUDA, beside the float64 oracle: scores, masks, history.
import numpy as np
import pytest
import torch
from allocation_models import assert_same_state, bench
from cuda_device import DEVICE
from test_allocator_masks import assert_same_history, step_beside, write

import rankwise as rw

SHAPES, RANKS = [(9, 7), (64, 48), (3001, 17)], [4, 8, 5]


@pytest.mark.parametrize("shrink", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_runs_beside_the_oracle(dtype, shrink):
    options = {"target_rank": 2, "total_steps": 12, "final_steps": 3, "shrink": shrink}
    b = bench(SHAPES, RANKS, dtype, device=DEVICE, **options)
    assert {factor.device.type for factor in b.factors} == {DEVICE}
    oracle, random = b.oracle(), np.random.default_rng(2)
    for step in range(1, 14):
        write(b, random, "normal")
        step_beside(b, oracle, f"step {step}")
    assert_same_history(b, oracle, "at the end")
    assert sum(b.allocator.ranks.values()) == 2 * len(SHAPES)
    kept = sum(int(kept.sum()) for kept in b.allocator.pattern.values())
    assert kept == 2 * len(SHAPES)


def test_the_penalty_is_the_cpus():
    def penalty(device: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        b = bench(SHAPES, RANKS, torch.float64, target_rank=2, total_steps=9)
        b.fill(lambda s: torch.randn(s, dtype=torch.float64), gradients=False)
        pairs = [
            [getattr(x, n).detach().to(device) for x in b.layers] for n in ("lora_A", "lora_B")
        ]
        leaves = [f.requires_grad_() for f in [*pairs[0], *pairs[1]]]
        value = rw.ops.orthogonality_penalty(pairs[0], pairs[1])
        return [value, *torch.autograd.grad(value, leaves)]

    for got, expected in zip(penalty(DEVICE), penalty("cpu"), strict=True):
        torch.testing.assert_close(got.cpu(), expected)


@pytest.fixture
def waiting_is_an_error():
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shrink", [True, False])
def test_only_the_freeze_step_waits(shrink, waiting_is_an_error):
    """A whole training step with the allocator attached, before the freeze and after it."""
    model, optimizer, allocator = trained_on_device(
        shrink=shrink, total_steps=30, warmup_steps=4, final_steps=8, allocation_interval=3
    )
    inputs = [torch.randn(16, 64, device=DEVICE) for _ in range(30)]
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8)
    for step, x in enumerate(inputs, 1):
        if step not in (1, 22):  # the first fills caches: handles, pinned memory
            waiting_is_an_error()
        optimizer.zero_grad()
        loss = model(x).square().mean() + 0.1 * allocator.orthogonality_penalty()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        torch.cuda.set_sync_debug_mode("default")
        scaler.update()
        assert allocator.frozen == (step >= 22)
    assert allocator.steps == 30 and allocator.skipped_steps == 0


def test_skipped_steps_leave_no_trace():
    """Steps with infinite gradients or left out by a fused optimizer, nobody waiting in between."""
    runs = []
    for skipping in (False, True):
        torch.manual_seed(1)
        model, optimizer, allocator = trained_on_device(total_steps=14, final_steps=4)
        for step in range(1, 15):
            x = torch.randn(16, 64, generator=torch.Generator().manual_seed(step)).to(DEVICE)
            if skipping and step % 3 == 0:
                optimizer.zero_grad()
                model(x).sum().backward()
                if step % 2 and not allocator.frozen:
                    model[0].lora_B.grad[3, 1] = float("nan")
                else:
                    optimizer.found_inf = torch.ones((), device=DEVICE)
                allocator.step(optimizer)
                optimizer.__dict__.pop("found_inf", None)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        assert allocator.skipped_steps == 4 * skipping
        runs.append((allocator.state_dict(), model.state_dict()))
    for got, wanted in zip(*reversed(runs), strict=True):
        assert_same_state(got, wanted, ignoring=["skipped_steps"])


def trained_on_device(**options):
    model = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.Tanh(), torch.nn.Linear(48, 8))
    config = rw.AdaLoRAConfig(
        target_modules=["0", "2"], initial_rank=6, target_rank=2, alpha=6.0, **options
    )
    model = rw.apply_lora(model.to(DEVICE), config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 0.01, fused=True)
    allocator = rw.RankAllocator(model, config)
    allocator.attach(optimizer)
    return model, optimizer, allocator
