"""PiSSA and OLoRA: adapters that begin with the largest part of the base's weight."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .config import _is_integer, _require
from .first_values import (
    FirstAdapter,
    FirstAdapters,
    FirstValues,
    Layers,
    Options,
    exact,
    top_svd,
)
from .tree import Tree


class _OfWeights(FirstValues):
    """A and B from the layer's weight alone, with no more directions than its smaller side."""

    def _find(self, tree: Tree, layers: Layers, options: Options) -> FirstAdapters:
        found = {}
        for path, layer in layers.items():
            weight = exact(layer._matrix(layer._base_weight()))
            own = replace(options[path], within_layer=True)
            within = own.within(min(weight.shape))
            A, B = self._factors(weight, within.rank_at_first, within.scaling)
            found[path] = FirstAdapter(own, A, B)
        return found

    def _factors(self, weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


@dataclass(frozen=True)
class PiSSA(_OfWeights):
    """The principal singular directions of the weight (arXiv 2404.02948).

    ``W0 = U S V^T``; with the r largest ``A = sqrt(S_r / scaling) V_r^T`` and
    ``B = U_r sqrt(S_r / scaling)``, so that the adapter holds ``U_r S_r V_r^T`` and the base gives
    it up.

    Args:
        iterations: of a randomised SVD, much quicker for large layers (PEFT's pissa_niter_16 is
            16); None for the exact one.
        seed: of the randomised SVD.
    """

    iterations: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        fits = self.iterations is None or (_is_integer(self.iterations) and self.iterations >= 0)
        _require(fits, "PiSSA", "iterations", "an integer >= 0 or None", self.iterations)
        _require(_is_integer(self.seed), "PiSSA", "seed", "an integer", self.seed)

    def _factors(self, weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
        U, S, Vh = top_svd(weight, rank, self.iterations, self.seed)
        root = (S / scaling).sqrt()
        return root[:, None] * Vh, U * root


@dataclass(frozen=True)
class OLoRA(_OfWeights):
    """The first columns of the weight's QR decomposition (arXiv 2406.01775).

    ``W0 = Q R``; ``B = Q[:, :r]``, orthonormal, and ``A = R[:r]``. The base gives up
    ``scaling * B A``.
    """

    def _factors(self, weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
        Q, R = torch.linalg.qr(weight)
        return R[:rank], Q[:, :rank]
