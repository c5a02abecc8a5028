# Paired timing: contenders take turns in random order, and ratios are taken turn by turn.
"""What every measurement here shares: sampling, medians with quartiles, ratios, a table."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from statistics import quantiles

from rich.console import Console
from rich.table import Table

Action = Callable[[], object]
Samples = dict[str, list[float]]  # milliseconds of each contender, turn by turn
console = Console(highlight=False, width=160)  # wide enough for the tables, also in a file


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
    ratio_low: float
    ratio_high: float


def sampled(
    contenders: Mapping[str, Action],
    repeats: int,
    how: Callable[[Action], float] = milliseconds,
) -> Samples:
    """Times all contenders `repeats` times, after one turn that does not count."""
    samples: Samples = {name: [] for name in contenders}
    for action in contenders.values():
        action()
    for _ in range(repeats):
        for name in random.sample(list(contenders), len(contenders)):
            samples[name].append(how(contenders[name]))
    return samples


def timings(
    samples: Samples, reference: str, names: Iterable[str] | None = None
) -> dict[str, Timing]:
    """Of `names`, or of all."""
    base = samples[reference]
    result = {}
    for name in names or samples:
        ratios = [own / other for own, other in zip(samples[name], base, strict=True)]
        low, middle, high = quantiles(samples[name], n=4, method="inclusive")
        ratio_low, ratio, ratio_high = quantiles(ratios, n=4, method="inclusive")
        result[name] = Timing(middle, low, high, ratio, ratio_low, ratio_high)
    return result


def paired(
    contenders: Mapping[str, Action],
    repeats: int,
    how: Callable[[Action], float] = milliseconds,
) -> dict[str, Timing]:
    """The timings of all contenders, with the first as the reference."""
    return timings(sampled(contenders, repeats, how), next(iter(contenders)))


def table(title: str, rows: Mapping[str, Timing], reference: str) -> Table:
    """One row for each contender."""
    result = Table(title=title, title_justify="left")
    result.add_column("contender")
    for column in ("median ms", "quartiles", f"time over {reference}", f"{reference} over time"):
        result.add_column(column, justify="right")
    for name, t in rows.items():
        ratio = f"{t.ratio:.3f} ({t.ratio_low:.3f} .. {t.ratio_high:.3f})"
        spread = f"{t.low:.3f} .. {t.high:.3f}"
        result.add_row(name, f"{t.median:.3f}", spread, ratio, f"{1 / t.ratio:.2f}x")
    return result


def as_json(rows: Mapping[str, Timing]) -> dict[str, dict[str, float]]:
    return {name: asdict(timing) for name, timing in rows.items()}
