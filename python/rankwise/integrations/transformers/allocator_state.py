"""An allocator's state in checkpoints: within the optimizer's state, and in a file beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from ...allocation import RankAllocator

FILE = "rank_allocator.safetensors"
_ENTRY = "rankwise_allocator"  # of the first parameter group; optimizers keep entries they know not


def carry(allocator: RankAllocator, optimizer: Optimizer):
    """From now on the optimizer's state_dict() has the allocator's; a handle to end it."""

    def add(optimizer: Optimizer, state: dict) -> None:
        state["param_groups"][0][_ENTRY] = copied(allocator.state_dict())

    return optimizer.register_state_dict_post_hook(add)


def take(optimizer: Optimizer) -> dict[str, Tensor] | None:
    """What a state that was loaded into the optimizer brought; it is no longer there then."""
    found = [group.pop(_ENTRY, None) for group in optimizer.param_groups]
    return found[0] if found else None


def write(allocator: RankAllocator, folder: str | os.PathLike) -> None:
    save_file(copied(allocator.state_dict()), Path(folder) / FILE)


def read(folder: str | os.PathLike) -> dict[str, Tensor] | None:
    """None where the folder has none."""
    path = Path(folder) / FILE
    return load_file(path) if path.is_file() else None


def copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, apart from what goes on changing."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
