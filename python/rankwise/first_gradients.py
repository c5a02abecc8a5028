"""LoRA-GA: adapters that begin with the singular directions of the weight's gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .adapted import Adapted
from .config import AdapterOptions, _is_integer, _is_real, _require
from .first_values import (
    FirstAdapter,
    FirstAdapters,
    FirstValues,
    Layers,
    Options,
    check_at_once,
    exact,
    in_eval,
    passes,
    top_svd,
)
from .tree import Tree

SCALES = ("paper", "peft")
_ITERATIONS = 4  # of the randomised SVD, as in PEFT


@dataclass(frozen=True)
class LoRAGA(FirstValues):
    """Low-rank adaptation with gradient approximation (arXiv 2407.05000).

    G [out, in] is the mean over the batches of dL/dW0, G = U S V^T and
    ``z = out^(1/4) / sqrt(gamma)``. ``A = z V_{1..r}^T`` and ``B = z U_{r+1..2r}``; the base gives
    up ``scaling * B A``. PEFT has ``A = V_{1..r}^T`` and ``B = z U_{r+1..2r} S_{r+1..2r}`` in their
    place (its defaults "ArB2r" and "stable"), so that B begins small where gradients are.

    The base runs in eval mode, and no ``.grad`` is written. A pass holds the gradients of its
    layers, in float32 (float64 over float64) and once more while a batch's are added: about twice
    the size of their weights, or of one weight with at_once=1. The SVD is randomised, of 4 r
    directions.

    Args:
        batches: a few, of any kind; in several processes all must have the same.
        loss: a function of the model and a batch that returns a scalar.
        gamma: see above, > 0: the larger, the smaller A and B.
        scale: "paper" or "peft"; see above.
        at_once: layers in one pass over the batches; None for all.
        seed: of the SVD.
    """

    batches: Iterable
    loss: Callable[[nn.Module, object], Tensor]
    gamma: float = 16.0
    scale: str = "paper"
    at_once: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _require(callable(self.loss), "LoRAGA", "loss", "a function of model and batch", self.loss)
        _require(_is_real(self.gamma) and self.gamma > 0, "LoRAGA", "gamma", "> 0", self.gamma)
        _require(self.scale in SCALES, "LoRAGA", "scale", f"one of {SCALES}", self.scale)
        check_at_once("LoRAGA", self.at_once)
        _require(_is_integer(self.seed), "LoRAGA", "seed", "an integer", self.seed)

    def _check(self, path: str, layer: Adapted, options: AdapterOptions) -> None:
        super()._check(path, layer, options)
        rank, side = options.rank_at_first, min(layer._sizes)
        if 2 * rank > side:
            raise ValueError(
                f"LoRAGA: {path!r} must have twice the rank's directions, got rank {rank} and a "
                f"side of {side}; give it at most {side // 2} in rank_pattern, or exclude it"
            )

    def _find(self, tree: Tree, layers: Layers, options: Options) -> FirstAdapters:
        found = {}
        for names, batches in passes("LoRAGA", self.batches, list(layers), self.at_once):
            chosen = {path: layers[path] for path in names}
            gradients = self._gradients(tree.model, chosen, batches)
            for path in names:
                gradient, rank = gradients.pop(path), options[path].rank_at_first
                found[path] = FirstAdapter(options[path], *self._factors(gradient, rank))
        return found

    def _factors(self, gradient: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        width = min(4 * rank, *gradient.shape)
        U, S, Vh = top_svd(gradient, width, _ITERATIONS, self.seed)
        A, B = Vh[:rank], U[:, rank : 2 * rank]
        size = gradient.shape[0] ** 0.25 / self.gamma**0.5
        if self.scale == "peft":
            return A, size * B * S[rank : 2 * rank]
        return size * A, size * B

    def _gradients(
        self, model: nn.Module, layers: Mapping[str, Adapted], batches: list
    ) -> dict[str, Tensor]:
        """{layer: the mean gradient of its weight [out, in]}"""
        weights = {path: layer._base_weight() for path, layer in layers.items()}
        sums = {path: torch.zeros_like(exact(weight)) for path, weight in weights.items()}
        for gradients in gradients_of("LoRAGA", model, weights, batches, self.loss):
            for path, total in sums.items():
                total += gradients[path]
        return {path: layers[path]._matrix(sums.pop(path) / len(batches)) for path in layers}


def gradients_of(
    owner: str,
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Iterable,
    loss: Callable[[nn.Module, object], Tensor],
) -> Iterator[dict[str, Tensor]]:
    """{layer: the gradient of its weight} of one batch after another; no ``.grad`` is written.

    Args:
        owner: in messages.
        model: runs in eval mode.
    """
    for batch in batches:
        with in_eval(model), _differentiable(list(weights.values())):
            value = loss(model, batch)
            if not (isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad):
                got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"{owner}: loss must return a scalar that depends on the adapted layers, got "
                    f"{got}"
                )
            gradients = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
        for path, gradient in zip(weights, gradients, strict=True):
            if gradient is None or not gradient.isfinite().all():
                got = "none" if gradient is None else "infinite values or NaN"
                raise ValueError(
                    f"{owner}: {path!r} must get a finite gradient from every batch, got {got}"
                )
        yield dict(zip(weights, gradients, strict=True))


@contextmanager
def _differentiable(weights: list[nn.Parameter]) -> Iterator[None]:
    """Within the block these require gradients, and autograd is on."""
    before = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for weight, required in zip(weights, before, strict=True):
            weight.requires_grad_(required)
