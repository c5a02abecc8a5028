# Errors of y, dx, dA, dB against float64, RMS and largest: at most those of PEFT, or a little more.
"""The reference is float64 on the same rounded inputs."""

import pytest
import torch
from layer_shapes import SHAPES
from peft_layer import peft_layer
from samples import DTYPES

import rankwise

# Times PEFT's. The largest of millions of errors is itself a matter of chance.
ALLOWANCE = {"rms": 1.02, "max": 1.05}
SCALING = 2.0
LARGE = 2**22  # elements of W0 from which on one seed gives enough numbers
RESULTS = ("y", "dx", "dA", "dB")


def draw(
    dtype: str, shape: tuple[int, ...], seed: int, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    base, adapter = DTYPES[dtype]
    tokens, n_in, n_out, rank = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, scale: float = 1.0, dtype: torch.dtype = base) -> torch.Tensor:
        return (torch.randn(size, generator=generator) * scale).to(device, dtype)

    return {
        "x": normal(tokens, n_in),
        "W": normal(n_out, n_in, scale=n_in**-0.5),
        "b": normal(n_out),
        "A": normal(rank, n_in, scale=n_in**-0.5, dtype=adapter),
        "B": normal(n_out, rank, scale=0.25 * rank**-0.5, dtype=adapter),
        "dy": normal(tokens, n_out),
    }


def exact(t: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    x, W, b, A, B, dy = (t[name].double() for name in ("x", "W", "b", "A", "B", "dy"))
    hidden, d_hidden = x @ A.t(), dy @ B
    y = torch.addmm(b, x, W.t()).addmm_(hidden, B.t(), alpha=SCALING)
    dx = (dy @ W).addmm_(d_hidden, A, alpha=SCALING)
    return [y, dx, SCALING * (d_hidden.t() @ x), SCALING * (dy.t() @ hidden)]


def ours(t: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    x, A, B = (t[name].detach().requires_grad_() for name in ("x", "A", "B"))
    y = rankwise.ops.lora_linear(x, t["W"], t["b"], A, B, scaling=SCALING)
    return [y.detach(), *torch.autograd.grad(y, [x, A, B], t["dy"])]


def theirs(t: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    layer = peft_layer(t["W"], t["b"], t["A"], t["B"], scaling=SCALING)
    x = t["x"].detach().requires_grad_()
    y = layer(x)
    factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    return [y.detach(), *torch.autograd.grad(y, [x, *factors], t["dy"])]


class Error:
    """What is known of the errors of all results that were added."""

    def __init__(self):
        self.largest, self.squares, self.count = 0.0, 0.0, 0

    def add(self, got: torch.Tensor, expected: torch.Tensor) -> None:
        difference = got.double().sub_(expected)
        self.largest = max(self.largest, difference.abs().max().item())
        self.squares += difference.square_().sum().item()
        self.count += difference.numel()

    def statistics(self) -> dict[str, float]:
        return {"rms": (self.squares / self.count) ** 0.5, "max": self.largest}


def check(shape: tuple[int, ...], dtype: str, device: str = "cpu") -> None:
    errors = {name: (Error(), Error()) for name in RESULTS}
    for seed in range(1 if shape[1] * shape[2] >= LARGE else 3):
        tensor = draw(dtype, shape, seed, device)
        for name, truth, mine, peft in zip(
            RESULTS, exact(tensor), ours(tensor), theirs(tensor), strict=True
        ):
            assert mine.dtype == peft.dtype
            errors[name][0].add(mine, truth)
            errors[name][1].add(peft, truth)
    worse = []
    for name, (mine, peft) in errors.items():
        theirs_by_kind = peft.statistics()
        for kind, a in mine.statistics().items():
            b = theirs_by_kind[kind]
            line = f"{name} {kind}: rankwise {a:.3e}, PEFT {b:.3e}, ratio {a / b:.3f}"
            print(line)
            if not a <= ALLOWANCE[kind] * b:
                worse.append(line)
    assert not worse, f"tokens, in, out, rank = {shape}, {dtype}: " + "; ".join(worse)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bfloat16_float32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_pefts(shape, dtype):
    check(shape, dtype)
