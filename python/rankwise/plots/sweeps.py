"""Scores of a sweep over ranks and learning rates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isfinite
from statistics import mean

from matplotlib.figure import Figure

from .look import COLORS, INK, MARKERS, dress, grid, legend_below, new_figure


def sweep_curves(
    rows: Iterable[Mapping], title: str = "Score by learning rate", score: str = "score"
) -> Figure:
    """A line for each rank: mean scores over folds and seeds, within their range.

    The best rate of each rank is marked by a ring.

    Args:
        rows: of one training each: "rank", "rate", "alpha" and "score", the higher the better;
            scores that are not finite are left out.
        score: what it is, with its unit.

    Raises:
        ValueError: no row has a finite score.
    """
    scores: dict[tuple, dict[float, list[float]]] = {}
    for row in rows:
        if isfinite(row["score"]):
            line = scores.setdefault((row["rank"], row["alpha"]), {})
            line.setdefault(row["rate"], []).append(row["score"])
    if not scores:
        raise ValueError("sweep_curves: rows must have at least one finite score, got none")
    figure, [axes] = new_figure(3.4)
    for place, ((rank, alpha), line) in enumerate(sorted(scores.items())):
        rates = sorted(line)
        means = [mean(line[rate]) for rate in rates]
        color, marker = COLORS[place % len(COLORS)], MARKERS[place % len(MARKERS)]
        style = ("-", "--", ":", "-.")[place // len(COLORS) % 4]
        axes.plot(rates, means, color=color, marker=marker, linestyle=style, markersize=5,
                  linewidth=1.6, label=f"r = {rank}, α = {alpha:g}")  # fmt: skip
        axes.fill_between(rates, [min(line[r]) for r in rates], [max(line[r]) for r in rates],
                          color=color, alpha=0.12, linewidth=0)  # fmt: skip
        best = max(range(len(rates)), key=means.__getitem__)
        axes.plot(rates[best], means[best], marker="o", markersize=11, color=color,
                  fillstyle="none", linestyle="none")  # fmt: skip
    axes.set_xscale("log")
    spread = any(len(own) > 1 for line in scores.values() for own in line.values())
    dress(axes, title, "learning rate", f"{score} (mean and range)" if spread else score)
    axes.tick_params(which="both", colors=INK, labelsize=8)
    grid(axes, "both")
    legend_below(figure, axes)
    return figure
