"""Adapters as a layer holds them: those that wait, and one by name."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .config import AdapterOptions
from .devices import FACTORS
from .directions import Directed, Directions


class StoredAdapter(Directed, nn.Module):
    """An adapter that is not active: its factors, options, rank and directions, frozen."""

    def __init__(
        self,
        factors: dict[str, nn.Parameter | None],
        options: AdapterOptions,
        rank: int,
        directions: Directions | None,
    ):
        super().__init__()
        for name in FACTORS:
            self.register_parameter(name, factors[name])
        self.requires_grad_(False)
        self.options = options
        self.rank = rank
        self.directions = directions

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
