"""Adapters as a layer holds them: those that wait, and one by name."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import AdapterOptions
from .devices import FACTORS
from .directions import Directed, Directions
from .first_factors import FIRST, FirstFactors


class StoredAdapter(Directed, nn.Module):
    """An adapter that is not active, frozen: its factors and what a layer notes of them."""

    def __init__(
        self,
        factors: dict[str, nn.Parameter | None],
        options: AdapterOptions,
        rank: int,
        directions: Directions | None,
        first: FirstFactors | None = None,
    ):
        super().__init__()
        for name in FACTORS:
            self.register_parameter(name, factors[name])
        self.requires_grad_(False)
        self.options = options
        self.rank = rank
        self.directions = directions
        self.register_module(FIRST, first)

    @torch.no_grad()
    def begin(self, A: Tensor, B: Tensor | None) -> None:
        """First values of the directions in use; with B the update is counted from them.

        Args:
            A: [rank, in].
            B: [out, rank], or None for zeros.
        """
        own_A, own_B = self.lora_A[: self.rank], self.lora_B[:, : self.rank]
        own_A.copy_(A)
        own_B.zero_()
        if B is not None:
            own_B.copy_(B)
            self.lora_first = FirstFactors(own_A, own_B)

    def keep_first(self, rank: int) -> None:
        """Lowers the rank of a new adapter; directions that are not active are zero."""
        self.rank = rank
        for factor in (self.lora_A, self.lora_B.t(), self.lora_E):
            if factor is not None:
                factor.detach()[rank:] = 0


@dataclass(frozen=True)
class HeldAdapter:
    """One adapter of a layer, active or not: the parameters themselves, not copies."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_E: nn.Parameter | None
    options: AdapterOptions
    rank: int
    lora_first: FirstFactors | None = None

    @property
    def update_rank(self) -> int:
        """Of the whole update: directions in use, and those of lora_first."""
        return self.rank + (0 if self.lora_first is None else self.lora_first.rank)
