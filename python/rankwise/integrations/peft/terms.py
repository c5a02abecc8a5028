"""An adapter's low-rank term of one call: what our operators take."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear

from ... import ops
from .decision import PLAIN

# lora_A, lora_B, lora_E or None, the bias or None, scaling and dropout's probability of
# ``scaling * (B diag(E) A drop(x) + bias)``. A plain tuple, for one is made in each call.
Term = tuple[Tensor, Tensor, Tensor | None, Tensor | None, float, float]


def term_of(
    A: Tensor,
    B: Tensor,
    E: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> Term | str:
    """A term, or why our operators may not compute it now."""
    if type(A) not in PLAIN or type(B) not in PLAIN:
        return f"a factor is a {type(B if type(A) in PLAIN else A).__name__}"
    if bias is not None and type(bias) not in PLAIN:
        return f"a bias is a {type(bias).__name__}"
    if type(scaling) is not float and type(scaling) is not int:
        return f"scaling is a {type(scaling).__name__}"
    return A, B, E, bias, scaling, dropout_p


def add_term(output: Tensor, x: Tensor, term: Term) -> Tensor:
    """A base's output with one more term; the operator takes an output of the input's type."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    A, B, E, bias, scaling, p = term
    if output.dtype is (torch.get_autocast_dtype(device) if autocast else x.dtype):
        output = ops.lora_update(output, x, A, B, E, scaling=scaling, dropout_p=p)
    else:
        directions = linear(dropout(x.to(A.dtype), p), A)
        directions = directions if E is None else directions * E.T
        output = (output + linear(directions, B) * scaling).to(output.dtype)
    return output if bias is None else output + (bias * scaling).to(output.dtype)
