# The contenders for one linear layer: what each computes, and the check it must pass to be timed.
"""A registry of layers over the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from layer_shapes import SHAPES as SHAPES
from samples import DTYPES
from torch import Tensor
from torch.nn import functional as F

import rankwise as rw

SCALING = 2.0
ALLOWANCE = 1.05  # times PEFT's root mean square error


@dataclass(frozen=True)
class Case:
    """One layer: sizes, dtype of base and adapters, dropout of the adapter's input."""

    tokens: int
    n_in: int
    n_out: int
    rank: int
    dtype: str = "float32"
    dropout: float = 0.0

    def __str__(self) -> str:
        sizes = f"{self.tokens}, {self.n_in} -> {self.n_out}, r {self.rank}"
        return f"{sizes}, {self.dtype}, dropout {self.dropout:g}"


@dataclass(frozen=True)
class Tensors:
    """x [tokens, in], W [out, in], b [out], A [rank, in], B [out, rank], dy [tokens, out]."""

    x: Tensor
    W: Tensor
    b: Tensor
    A: Tensor
    B: Tensor
    dy: Tensor

    @staticmethod
    def draw(case: Case, device: str = "cpu", seed: int = 0) -> Tensors:
        generator = torch.Generator(device).manual_seed(seed)
        base, adapter = DTYPES[case.dtype]

        def normal(*size: int, scale: float = 1.0, dtype: torch.dtype = base) -> Tensor:
            return torch.randn(size, generator=generator, device=device).mul_(scale).to(dtype)

        drawn = Tensors(
            normal(case.tokens, case.n_in),
            normal(case.n_out, case.n_in, scale=case.n_in**-0.5),
            normal(case.n_out),
            normal(case.rank, case.n_in, scale=case.n_in**-0.5, dtype=adapter),
            normal(case.n_out, case.rank, scale=0.25 * case.rank**-0.5, dtype=adapter),
            normal(case.tokens, case.n_out),
        )
        for tensor in (drawn.x, drawn.A, drawn.B):
            tensor.requires_grad_()
        return drawn


@dataclass(frozen=True)
class Layer:
    """forward() computes y from x with autograd; inputs are what backward gives gradients for."""

    forward: Callable[[], Tensor]
    inputs: list[Tensor]


def frozen(case: Case, t: Tensors) -> Layer:
    return Layer(lambda: F.linear(t.x, t.W, t.b), [t.x])


class _Packed(torch.autograd.Function):
    """The frozen layer by oneDNN, whose weight was packed ahead for y and for dx."""

    @staticmethod
    def forward(ctx, x, for_y, for_dx, b):
        ctx.for_dx = for_dx
        return torch.ops.mkldnn._linear_pointwise(x, for_y, b, "none", [], "")

    @staticmethod
    def backward(ctx, dy):
        dx = torch.ops.mkldnn._linear_pointwise(dy, ctx.for_dx, None, "none", [], "")
        return dx, None, None, None


def frozen_packed(case: Case, t: Tensors) -> Layer:
    pack = torch.ops.mkldnn._reorder_linear_weight
    for_y, for_dx = pack(t.W, case.tokens), pack(t.W.t().contiguous(), case.tokens)
    return Layer(lambda: _Packed.apply(t.x, for_y, for_dx, t.b), [t.x])


def _peft(case: Case, t: Tensors) -> torch.nn.Module:
    from peft_layer import peft_layer  # where PEFT is missing its contenders are left out

    return peft_layer(t.W, t.b, t.A, t.B, scaling=SCALING, dropout=case.dropout)


def peft(case: Case, t: Tensors) -> Layer:
    layer = _peft(case, t)
    return Layer(lambda: layer(t.x), [t.x, *(p for p in layer.parameters() if p.requires_grad)])


def peft_accelerated(case: Case, t: Tensors) -> Layer:
    from rankwise.integrations.peft import accelerate

    layer = _peft(case, t)
    accelerate(layer)
    return Layer(lambda: layer(t.x), [t.x, *(p for p in layer.parameters() if p.requires_grad)])


def peft_compiled(case: Case, t: Tensors) -> Layer:
    layer = _peft(case, t)
    compiled = torch.compile(layer, dynamic=False)
    return Layer(lambda: compiled(t.x), [t.x, *(p for p in layer.parameters() if p.requires_grad)])


def merged(case: Case, t: Tensors) -> Layer:
    """One product with W + s B A, formed in each call; it knows no dropout."""

    def forward() -> Tensor:
        return F.linear(t.x, torch.addmm(t.W, t.B, t.A, alpha=SCALING), t.b)

    return Layer(forward, [t.x, t.A, t.B])


def composition(case: Case, t: Tensors) -> Layer:
    """PyTorch's own operations, as few as there can be."""

    def forward() -> Tensor:
        hidden = F.dropout(t.x, case.dropout) @ t.A.t()
        return torch.addmm(F.linear(t.x, t.W, t.b), hidden, t.B.t(), alpha=SCALING)

    return Layer(forward, [t.x, t.A, t.B])


def ours(case: Case, t: Tensors) -> Layer:
    def forward() -> Tensor:
        return rw.ops.lora_linear(t.x, t.W, t.b, t.A, t.B, scaling=SCALING, dropout_p=case.dropout)

    return Layer(forward, [t.x, t.A, t.B])


CONTENDERS: dict[str, Callable[[Case, Tensors], Layer]] = {
    "frozen": frozen,
    "frozen, twice": frozen,
    "frozen, packed": frozen_packed,
    "PEFT": peft,
    "PEFT accelerated": peft_accelerated,
    "PEFT compiled": peft_compiled,
    "merged each call": merged,
    "composition": composition,
    "rankwise": ours,
}
WITHOUT_DROPOUT = ("merged each call",)  # the frozen layer is the reference of all cases


def check(case: Case, device: str = "cpu") -> None:
    """Raises unless y and dx of ours are at least as exact as PEFT's, without dropout."""
    plain = Case(case.tokens, case.n_in, case.n_out, case.rank, case.dtype)
    t = Tensors.draw(plain, device)
    wide = Tensors(*(getattr(t, name).detach().double() for name in Tensors.__annotations__))
    update = wide.W + SCALING * wide.B @ wide.A
    exact = [F.linear(wide.x, update, wide.b), wide.dy @ update]
    errors = {}
    for name in ("rankwise", "PEFT"):
        y = CONTENDERS[name](plain, t).forward()
        got = [y.detach(), torch.autograd.grad(y, t.x, t.dy)[0]]
        errors[name] = [
            (g.double() - e).square().mean().sqrt().item() for g, e in zip(got, exact, strict=True)
        ]
    for what, mine, theirs in zip(("y", "dx"), errors["rankwise"], errors["PEFT"], strict=True):
        if not mine <= ALLOWANCE * theirs:
            raise AssertionError(f"{case}: error of {what} is {mine:.3e}, PEFT's {theirs:.3e}")
