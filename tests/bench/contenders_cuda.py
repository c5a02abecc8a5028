# Contenders that only a GPU is asked about: PEFT under autocast, and two compositions of products.
"""Adds to contenders.CONTENDERS; each case has those that suit its dtypes and dropout."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .contenders import (
    CONTENDERS,
    SCALING,
    Case,
    Layer,
    Tensors,
    frozen,
    ours,
    peft,
    peft_compiled,
)


def _under_autocast(make: Callable[[Case, Tensors], Layer]) -> Callable[[Case, Tensors], Layer]:
    def layer(case: Case, t: Tensors) -> Layer:
        inner = make(case, t)

        def forward() -> Tensor:
            with torch.autocast("cuda", t.W.dtype):
                return inner.forward()

        return Layer(forward, inner.inputs)

    return layer


class _BaseFirst(torch.autograd.Function):
    """The mathematics of Unsloth's LoRA_W: x A^T and dy B are computed anew where they are used."""

    @staticmethod
    def forward(ctx, x, W, b, A, B):
        ctx.save_for_backward(x, W, A, B)
        return F.linear(x, W, b).addmm_(x @ A.t(), B.t(), alpha=SCALING)

    @staticmethod
    def backward(ctx, dy):
        x, W, A, B = ctx.saved_tensors
        dA = ((dy @ B).t() @ x).mul_(SCALING)
        dB = (dy.t() @ (x @ A.t())).mul_(SCALING)
        dx = (dy @ W).addmm_(dy @ B, A, alpha=SCALING)
        return dx, None, None, dA, dB


class _Accumulated(torch.autograd.Function):
    """cuBLAS alone: the LoRA term is written first and the base product accumulated onto it."""

    @staticmethod
    def forward(ctx, x, W, b, A, B):
        hidden = x @ A.t()
        ctx.save_for_backward(x, W, A, B, hidden)
        return torch.addmm(b, hidden, B.t(), alpha=SCALING).addmm_(x, W.t())

    @staticmethod
    def backward(ctx, dy):
        x, W, A, B, hidden = ctx.saved_tensors
        dh = (dy @ B).mul_(SCALING)
        dx = (dh @ A).addmm_(dy, W)
        return dx, None, None, dh.t() @ x, (dy.t() @ hidden).mul_(SCALING)


def _of(function: type[torch.autograd.Function]) -> Callable[[Case, Tensors], Layer]:
    def layer(case: Case, t: Tensors) -> Layer:
        return Layer(lambda: function.apply(t.x, t.W, t.b, t.A, t.B), [t.x, t.A, t.B])

    return layer


CUDA_CONTENDERS: dict[str, Callable[[Case, Tensors], Layer]] = {
    "frozen": frozen,
    "frozen, twice": frozen,
    "PEFT": peft,
    "PEFT compiled": peft_compiled,
    "PEFT, autocast": _under_autocast(peft),
    "Unsloth's mathematics": _of(_BaseFirst),
    "cuBLAS accumulated": _of(_Accumulated),
    "rankwise": ours,
}
assert CONTENDERS["rankwise"] is ours


def suited(case: Case) -> list[str]:
    """Names of the contenders that compute this case."""
    mixed = case.dtype.endswith("_float32")
    without = set() if mixed else {n for n in CUDA_CONTENDERS if "autocast" in n}
    if mixed or case.dropout:
        without |= {"Unsloth's mathematics", "cuBLAS accumulated"}
    return [name for name in CUDA_CONTENDERS if name not in without]
