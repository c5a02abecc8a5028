# Paired timing: contenders take turns in random order, and ratios are taken turn by turn.
"""What every measurement here shares: sampling, medians with quartiles, ratios, a table."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from statistics import median, quantiles

from rich.console import Console
from rich.table import Table

Action = Callable[[], object]
console = Console(highlight=False, width=140)  # wide enough for the tables, also in a file


def milliseconds(action: Action) -> float:
    start = time.perf_counter()
    action()
    return 1e3 * (time.perf_counter() - start)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one contender, and its time over the reference's in the same turn."""

    median: float
    low: float  # lower and upper quartile
    high: float
    ratio: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ms ({self.low:.3f} .. {self.high:.3f}), ratio {self.ratio:.3f}"


def paired(
    contenders: Mapping[str, Action],
    repeats: int,
    how: Callable[[Action], float] = milliseconds,
) -> dict[str, Timing]:
    """Times all contenders `repeats` times; the first is the reference of the ratios."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for action in contenders.values():
        action()
    for _ in range(repeats):
        for name in random.sample(list(contenders), len(contenders)):
            samples[name].append(how(contenders[name]))
    reference = next(iter(samples.values()))
    return {name: _timing(own, reference) for name, own in samples.items()}


def _timing(own: list[float], reference: list[float]) -> Timing:
    low, _, high = quantiles(own, n=4)
    return Timing(
        median(own), low, high, median(t / r for t, r in zip(own, reference, strict=True))
    )


def table(title: str, timings: Mapping[str, Timing], reference: str) -> Table:
    """One row for each contender."""
    result = Table(title=title, title_justify="left")
    result.add_column("contender")
    for column in ("median ms", "quartiles", f"time over {reference}", f"{reference} over time"):
        result.add_column(column, justify="right")
    for name, timing in timings.items():
        spread = f"{timing.low:.3f} .. {timing.high:.3f}"
        ratios = (f"{timing.ratio:.3f}", f"{1 / timing.ratio:.2f}x")
        result.add_row(name, f"{timing.median:.3f}", spread, *ratios)
    return result


def as_json(timings: Mapping[str, Timing]) -> dict[str, dict[str, float]]:
    return {name: asdict(timing) for name, timing in timings.items()}
