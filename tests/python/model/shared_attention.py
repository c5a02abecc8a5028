# An attention over layers with adapters, and how often layers are computed together.
from __future__ import annotations

import copy

import torch
from group_calls import GroupCalls
from small_models import randomise
from torch import Tensor, nn

import rankwise as rw


def count(call) -> int:
    with GroupCalls() as counted:
        call()
    return counted.count


class Attention(nn.Module):
    """q, k and v, which `forward` calls one by one."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, n) for n in (6, 4, 5))
        config = rw.LoRAConfig(rank=2, target_modules=["q", "k", "v"], **options)
        randomise(rw.apply_lora(self, config))

    def forward(self, x: Tensor, other: Tensor | None = None) -> list[Tensor]:
        return [self.q(x), *(layer(x if other is None else other) for layer in (self.k, self.v))]


def shared(attention: Attention | None = None) -> tuple[Attention, Attention, Tensor]:
    """An attention that shares its input, one that does not, and an input."""
    attention = attention or Attention()
    alone = copy.deepcopy(attention)
    assert [x.names for x in rw.share_inputs(attention)] == [("q", "k", "v")]
    return attention, alone, torch.randn(3, 6)
