# What the oracle says about torch tensors: their float64 problem, and the comparison of results.
from __future__ import annotations

import numpy as np
import oracle
import torch
from samples import NAMES, Sample, arguments
from tolerances import assert_close


def exact(tensor: torch.Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.detach().cpu().to(torch.float64).numpy()


def problem(
    tensor: dict[str, torch.Tensor],
    *,
    scaling: float,
    dropout_p: float = 0.0,
    rank: int | None = None,
    seed: torch.Tensor | None = None,
) -> oracle.Problem:
    """The float64 problem of the op's arguments; `seed` is the one the forward op returned."""
    x = exact(tensor["input"])
    factor = None
    if oracle.dropout_threshold(dropout_p) > 0:
        tokens = int(np.prod(x.shape[:-1], dtype=np.int64))
        mask = oracle.dropout_mask(int(seed.item()), tokens, x.shape[-1], dropout_p)
        factor = mask * oracle.dropout_keep_scale(dropout_p)
    capacity = tensor["lora_A"].shape[0]
    return oracle.Problem(
        x=x,
        weight=exact(tensor["weight"]),
        bias=exact(tensor.get("bias")),
        A=exact(tensor["lora_A"]),
        B=exact(tensor["lora_B"]),
        gate=exact(tensor.get("lora_E")),
        scaling=scaling,
        rank=capacity if rank is None else rank,
        factor=factor,
    )


def raw_forward(sample: Sample, tensor: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """(output, hidden, seed) of the inner op; draws the same seed as the public op would."""
    args, kwargs = arguments(sample, tensor)
    with torch.no_grad():
        return torch.ops.rankwise._lora_linear_forward(
            *args, kwargs["scaling"], kwargs["dropout_p"], sample.rank[0]
        )


def assert_output(y: torch.Tensor, found: oracle.Problem, what: str = "y", **options) -> None:
    magnitude = oracle.forward(found.absolute())
    assert_close(y, oracle.forward(found), magnitude, what, **options)


def assert_gradients(
    got: dict[str, torch.Tensor], grad_output: torch.Tensor, found: oracle.Problem, **options
) -> None:
    """`got` maps some of x W b A B E to gradients."""
    dy = exact(grad_output)
    wanted = oracle.gradients(found, dy)
    magnitudes = oracle.gradients(found.absolute(), np.abs(dy))
    for name, gradient in got.items():
        assert_close(
            gradient, wanted[name], magnitudes[name], f"gradient of {NAMES[name]}", **options
        )
