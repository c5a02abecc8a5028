"""RankHistory: what an allocator decided, as a file that outlives the training."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from .allocator import Allocator
from .config import _is_integer

FILE = "rank_history.json"  # where reports look for it, in an adapter's folder


@dataclass(frozen=True)
class RankEvent:
    """One allocation: the optimizer step, the budget from then on, and the ranks by module."""

    step: int
    budget: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class RankHistory:
    """An allocator's history with the modules' names.

    Args:
        names: of the modules.
        unit: of budgets: "directions" or "parameters".
        events: in their order; of each the ranks in the order of the names.
    """

    names: tuple[str, ...]
    unit: str
    events: tuple[RankEvent, ...]

    @classmethod
    def of(cls, allocator: Allocator) -> RankHistory:
        triplets = getattr(allocator.config, "budget_unit", "parameters") == "triplets"
        events = (RankEvent(e.step, e.budget, tuple(e.ranks)) for e in allocator.history)
        unit = "directions" if triplets else "parameters"
        return cls(tuple(allocator.ranks), unit, tuple(events))

    def save(self, path: str | os.PathLike) -> None:
        """Writes JSON; in an adapter's folder reports look for ``rank_history.json``."""
        Path(path).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike) -> RankHistory:
        """What save() wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no such file.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            events = tuple(RankEvent(e["step"], e["budget"], tuple(e["ranks"]))
                           for e in found["events"])  # fmt: skip
            history = cls(tuple(found["names"]), found["unit"], events)
        except (ValueError, RecursionError, KeyError, TypeError):
            history = None
        if history is None or not history._sound:
            raise ValueError(
                f"{path}: must be a rank history, as rankwise.RankHistory.of(allocator).save() "
                "writes it"
            )
        return history

    @property
    def _sound(self) -> bool:
        numbers = [n for e in self.events for n in (e.step, e.budget, *e.ranks)]
        return (
            all(isinstance(text, str) for text in (*self.names, self.unit))
            and all(_is_integer(number) and number >= 0 for number in numbers)
            and all(len(event.ranks) == len(self.names) for event in self.events)
        )
