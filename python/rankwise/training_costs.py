"""What adapters cost a training, before it starts: parameters, memory, arithmetic and time."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn

from .nn import LoRALinear
from .report import LayerSummary, summary

ADAM_AVERAGES = 2
REPEATS = 5


@dataclass(frozen=True)
class TrainingCosts:
    """Of a model with adapters, for one batch of tokens.

    Args:
        adapters: how many layers have one.
        trainable, parameters: that are trained, and of the base.
        weight_bytes: of the base.
        training_bytes: the trained parameters, their gradients and Adam's two averages.
        hidden_bytes: what adapters keep of the forward pass, [tokens, rank] each; inputs are kept
            by reference.
        full_training_bytes: gradients and averages if the base were trained.
        arithmetic_share: multiplications of all adapters over those of the frozen linear layers,
            forward and backward. Time grows by more: small products wait for memory.
    """

    adapters: int
    trainable: int
    parameters: int
    weight_bytes: int
    training_bytes: int
    hidden_bytes: int
    full_training_bytes: int
    arithmetic_share: float


@dataclass(frozen=True)
class StepTimes:
    """Seconds of forward and backward of all linear layers, by timing one of each size."""

    frozen: float
    adapted: float


def training_costs(model: nn.Module, tokens: int) -> TrainingCosts:
    """Counted from shapes, so that the model may be on the meta device.

    Args:
        model: with adapters, of which the active one is trained.
        tokens: of a batch, all sequences together.
    """
    layers = [layer for layer in summary(model).layers if layer.rank > 0]
    base = [p for p in model.parameters() if not p.requires_grad]
    trained = [p for p in model.parameters() if p.requires_grad]
    weights, own = _bytes(base), _bytes(trained)
    frozen = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    added = sum(layer.rank * (layer.in_features + layer.out_features) for layer in layers)
    return TrainingCosts(
        adapters=len(layers),
        trainable=sum(p.numel() for p in trained),
        parameters=sum(p.numel() for p in base),
        weight_bytes=weights,
        training_bytes=(2 + ADAM_AVERAGES) * own,
        hidden_bytes=sum(tokens * layer.rank * layer.base_dtype.itemsize for layer in layers),
        full_training_bytes=(1 + ADAM_AVERAGES) * weights,
        # forward and backward: 2 products of [tokens, in] x [in, out]; 6 of an adapter's halves
        arithmetic_share=6 * added / (4 * frozen) if frozen else 0.0,
    )


def step_times(model: nn.Module, tokens: int, device: str = "cpu") -> StepTimes:
    """Times a frozen and an adapted layer of each size of the model's, on this machine."""
    sizes = Counter(_size(layer) for layer in summary(model).layers if layer.rank > 0)
    frozen = adapted = 0.0
    for (n_in, n_out, rank, dtype), count in sizes.items():
        plain = nn.Linear(n_in, n_out, device=device, dtype=dtype).requires_grad_(False)
        layer = LoRALinear.from_linear(plain, rank=rank)
        x = torch.randn(tokens, n_in, device=device, dtype=dtype, requires_grad=True)
        frozen += count * _seconds(plain, x)
        adapted += count * _seconds(layer, x)
    return StepTimes(frozen, adapted)


def _size(layer: LayerSummary) -> tuple[int, int, int, torch.dtype]:
    return layer.in_features, layer.out_features, layer.rank, layer.base_dtype


def _seconds(layer: nn.Module, x: torch.Tensor) -> float:
    """The median of some passes, after one that is not counted."""

    def wait() -> None:
        if x.is_cuda:
            torch.cuda.synchronize()

    times = []
    for _ in range(1 + REPEATS):
        wait()
        start = time.perf_counter()
        y = layer(x)
        y.backward(torch.ones_like(y))
        wait()
        times.append(time.perf_counter() - start)
    return median(times[1:])


def _bytes(tensors: list[nn.Parameter]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
