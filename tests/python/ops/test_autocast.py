# lora_linear under autocast: the base in the lower precision, float32 adapters stay masters.
import numpy as np
import oracle
import pytest
import torch
from expected import exact, problem
from tolerances import assert_close, unit_roundoff

import rankwise

SHAPES = {
    "input": (2, 6, 40),
    "weight": (24, 40),
    "bias": (24,),
    "lora_A": (5, 40),
    "lora_B": (24, 5),
    "lora_E": (5, 1),
}
KEYS = dict(zip("xWbABE", SHAPES, strict=True))
LOWER = [torch.bfloat16, torch.float16]


def data(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {
        name: (torch.randn(shape) * shape[-1] ** -0.5).to(dtype).requires_grad_()
        for name, shape in SHAPES.items()
    }


def run(tensor: dict[str, torch.Tensor], p: float = 0.0) -> torch.Tensor:
    torch.manual_seed(8)
    return rankwise.ops.lora_linear(*tensor.values(), scaling=2.0, dropout_p=p)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("lower", LOWER)
def test_values_and_gradients(lower, p):
    tensor = data()
    with torch.autocast("cpu", lower):
        y = run(tensor, p)
        linear = torch.nn.functional.linear(tensor["input"], tensor["weight"], tensor["bias"])
    assert y.dtype == linear.dtype == lower
    dy = torch.randn_like(y)
    gradients = torch.autograd.grad(y, list(tensor.values()), dy)
    assert {g.dtype for g in gradients} == {torch.float32}

    # What the op must have seen: the base rounded to the lower dtype, the adapter as it is.
    seen = {
        n: t.detach().to(lower) if n in ("input", "weight", "bias") else t
        for n, t in tensor.items()
    }
    torch.manual_seed(8)
    seed = torch.ops.rankwise._lora_linear_forward(*(t.detach() for t in seen.values()), 2.0, p, 5)[
        2
    ]
    found = problem(seen, scaling=2.0, dropout_p=p, seed=seed)
    assert_close(y, oracle.forward(found), oracle.forward(found.absolute()), "y")
    wanted = oracle.gradients(found, exact(dy))
    magnitudes = oracle.gradients(found.absolute(), np.abs(exact(dy)))
    for key, gradient in zip(KEYS, gradients, strict=True):
        dtype = lower if key in "xWb" else torch.float32
        assert_close(
            gradient, wanted[key], magnitudes[key], f"gradient of {KEYS[key]}", dtype=dtype
        )


@pytest.mark.parametrize("lower", LOWER)
def test_adapter_is_not_rounded(lower):
    tensor = data()
    tiny = unit_roundoff(lower) / 16  # lost when 1 + tiny is rounded to the lower dtype
    ones = torch.ones(1, 1)
    with torch.autocast("cpu", lower):
        y = rankwise.ops.lora_linear(ones, 0 * ones, None, ones + tiny, ones, scaling=1 / tiny)
        z = rankwise.ops.lora_linear(ones, 0 * ones, None, ones, ones, scaling=1 / tiny)
    assert y.item() == pytest.approx(1 / tiny + 1, rel=2 * unit_roundoff(lower))
    assert tensor["lora_A"].dtype == torch.float32 and z.dtype == lower


def test_float64_is_left_alone_as_by_linear():
    tensor = data(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = run(tensor)
        linear = torch.nn.functional.linear(tensor["input"], tensor["weight"], tensor["bias"])
    assert y.dtype == linear.dtype == torch.float64
    torch.testing.assert_close(y, run(tensor))


def test_a_model_already_in_bfloat16_is_unchanged():
    tensor = data(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(tensor, 0.3)
    assert torch.equal(inside, run(tensor, 0.3))


def test_autocast_switched_off_inside():
    tensor = data()
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert torch.equal(run(tensor), run(tensor)) and run(tensor).dtype == torch.float32


def test_several_steps_under_one_autocast_accumulate_float32_gradients():
    tensor = data()
    with torch.autocast("cpu", torch.bfloat16):
        total = sum(run(tensor).float().sum() for _ in range(3))
    total.backward()
    for name in ("lora_A", "lora_B", "lora_E", "weight"):
        assert tensor[name].grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        once = torch.autograd.grad(run(tensor).float().sum(), tensor["lora_B"])[0]
    torch.testing.assert_close(tensor["lora_B"].grad, 3 * once)
