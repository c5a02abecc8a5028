# A training step as a user writes it, of models that share their base.
from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import AdamW

import rankwise as rw


@dataclass(frozen=True)
class Step:
    """loss() is what is minimised; after() what follows the optimizer's step."""

    model: nn.Module
    loss: Callable[[], Tensor]
    optimizer: AdamW
    after: Callable[[], object] = lambda: None
    allocator: rw.RankAllocator | None = None

    def __call__(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.after()
        self.optimizer.zero_grad()


def shared(model: nn.Module) -> nn.Module:
    """A copy of the modules over the same parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def optimizer_of(model: nn.Module, **options) -> AdamW:
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, **options)
