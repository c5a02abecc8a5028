"""Gradients that join the others when a backward pass ends, past the hooks of DDP."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import Function, Variable
from torch.autograd.function import once_differentiable


def late(value: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """`value`, whose gradients are added to the parameters' ``grad`` after all others.

    DistributedDataParallel counts each parameter's gradients as it found them in the graph of the
    forward pass: a term outside of it, over parameters that took no part, is one too many. Such a
    term must be the same in every process.
    """
    anchor = torch.zeros((), requires_grad=True)
    return _Late.apply(anchor, (value, parameters))


class _Late(Function):
    @staticmethod
    def forward(ctx, anchor: Tensor, term: tuple[Tensor, Sequence[Tensor]]) -> Tensor:
        ctx.term = term
        return term[0].detach().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        value, parameters = ctx.term
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        gradients = torch.autograd.grad(value, trained, grad_output, retain_graph=True)
        _at_the_end(lambda: _accumulate(trained, gradients))
        return None, None


def _at_the_end(action: Callable[[], None], callbacks: int = 3) -> None:
    """Calls it after the callbacks with which DDP ends a pass.

    These are queued while the pass runs, or, of a static graph, by one of them.
    """
    queue = Variable._execution_engine.queue_callback
    queue(action if callbacks == 1 else lambda: _at_the_end(action, callbacks - 1))


@torch.no_grad()
def _accumulate(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            parameter.grad += gradient
