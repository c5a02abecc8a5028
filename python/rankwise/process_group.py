"""The processes that train together, over which an allocator compares its decisions."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

DEFAULT = "default"  # torch.distributed's, where there is one


def check_group(owner: str, group) -> None:
    """Raises TypeError unless it is a process group, "default" or None."""
    if group is None or group == DEFAULT:
        return
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(
            f"{owner}: group must be a torch.distributed process group that this process is in, "
            f'"{DEFAULT}" or None, got {group!r}'
        )


def present(group):
    """The process group now, if it has more than one process; else None."""
    if group is None or not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if group == DEFAULT else group
    return group if dist.get_world_size(group) > 1 else None


def gatherer(owner: str, group) -> Callable[[Tensor], list[Tensor]]:
    """What gathers an int64 tensor on the CPU, of one size, from all processes of a group.

    Raises:
        RuntimeError: from the call, where a process has ended, or has not come within the group's
            timeout.
    """
    devices = [part.partition(":")[0] for part in dist.get_backend_config(group).split(",")]
    device = torch.device("cpu" if "cpu" in devices else devices[0])

    def gather(mine: Tensor) -> list[Tensor]:
        own = mine.to(device)
        every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        try:
            dist.all_gather(every, own, group=group)
        except RuntimeError as error:
            raise RuntimeError(
                f"{owner}: the processes of its group could not compare what they decided: one "
                f"has ended, or did not come within the group's timeout: {error}"
            ) from error
        return [one.cpu() for one in every]

    return gather
