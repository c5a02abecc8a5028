"""The constant first factors of an adapter that begins inside the base."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FIRST = "lora_first"


class FirstFactors(nn.Module):
    """A0 [rank, in] and -B0 [out, rank] of an adapter whose update is scaling * (B A - B0 A0).

    PiSSA's kind: B A begins with a part of the base, W0 = (W0 - scaling B0 A0) + scaling B0 A0. The
    base is not written; what it would lose is subtracted from the update in its place. So the
    adapter is a plain LoRA with A0 and -B0 as more directions, which do not train. They are
    buffers: no optimizer takes them, and they are in a state_dict().
    """

    def __init__(self, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.register_buffer("lora_A", A.detach().clone())
        self.register_buffer("lora_B", -B.detach())

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]


def with_first(
    first: FirstFactors | None, A: Tensor, B: Tensor, rank: int
) -> tuple[Tensor, Tensor, int]:
    """A, B and rank of the whole update: the directions in use, and then the constant ones."""
    if first is None:
        return A, B, rank
    A = torch.cat([A[:rank], first.lora_A.to(A.dtype)])  # fully_shard may cast A and B alone
    B = torch.cat([B[:, :rank], first.lora_B.to(B.dtype)], dim=1)
    return A, B, rank + first.rank
