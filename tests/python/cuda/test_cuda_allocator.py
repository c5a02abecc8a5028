# AdaLoRA's allocator over parameters on CUDA, beside the float64 oracle: scores, masks, history.
import numpy as np
import pytest
import torch
from allocation_models import bench
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
