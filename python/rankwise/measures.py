"""What logs of a training have of its allocator."""

from __future__ import annotations

import torch

from .allocation import RankAllocator
from .allocator import Allocator


@torch.no_grad()
def measures(allocator: Allocator, form: str = "squared_sum") -> dict[str, float]:
    """{name: number}: budget and mean rank, and AdaLoRA's penalty or what is left of the budget.

    Args:
        form: of the penalty, see RankAllocator.orthogonality_penalty.
    """
    ranks = allocator.ranks.values()
    found = {"budget": allocator.budget, "rank_mean": sum(ranks) / max(len(ranks), 1)}
    if isinstance(allocator, RankAllocator):
        return _named("adalora", found | {"penalty": allocator.orthogonality_penalty(form).item()})
    return _named("spectral", found | {"bank": allocator.bank})


@torch.no_grad()
def scores(allocator: Allocator) -> dict[str, float]:
    """{name: number}: of AdaLoRA's directions now; of the spectral ones in the step of an event."""
    if not isinstance(allocator, RankAllocator):
        event = allocator.last_event
        if event is None or event.step != allocator.steps:
            return {}
        found = {"lowest_kept": event.lowest_kept, "highest_dropped": event.highest_dropped}
        return _named("spectral/score", {name: x for name, x in found.items() if x == x})
    now = allocator.scores
    if now is None:
        return {}
    kept = torch.cat(list(allocator.pattern.values())).to(now.device)
    parts = {
        "mean": (now, torch.mean),
        "largest": (now, torch.max),
        "lowest_kept": (now[kept], torch.min),
        "highest_pruned": (now[~kept], torch.max),
    }
    found = {name: of(part).item() for name, (part, of) in parts.items() if part.numel()}
    return _named("adalora/score", found)


def _named(group: str, found: dict[str, float]) -> dict[str, float]:
    return {f"{group}/{name}": value for name, value in found.items()}
