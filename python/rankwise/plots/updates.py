"""Singular values of updates, and what updates amplify."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from statistics import median

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ..adapted import Adapted
from ..analysis import Amplification, Update, delta_spectrum
from .groups import grouped
from .lines import draw_lines
from .look import COLORS, INK, dress, legend_below, literal, new_figure, say

ROUNDING = 1e-12  # of the largest singular value
KINDS = {"update": "its own directions", "weight": "W's first directions",
         "random": "random directions"}  # fmt: skip


def spectra(
    updates: Mapping[str, Update | Adapted], title: str = "Singular values of the updates"
) -> Figure:
    """The singular values of updates, largest first; of many modules, medians and ranges.

    Args:
        updates: {module: update}, such as ``rankwise.analysis.updates(folder)``.

    Raises:
        ValueError: there are none.
    """
    if not updates:
        raise ValueError("spectra: updates must have at least one module, got none")
    values = {name: delta_spectrum(update).S.tolist() for name, update in updates.items()}
    series = {name: [s for s in own if s > ROUNDING * own[0]] for name, own in values.items()}
    longest = max(map(len, series.values()))
    labels = "direction", "singular value"
    figure, panels = draw_lines(range(1, longest + 1), series, title, labels, median)
    for axes in panels:
        axes.set_xlim(0.5, max(longest, 1) + 0.5)
        axes.locator_params(axis="x", integer=True)
        if longest:
            _by_powers(axes.set_yscale, axes.yaxis)
        else:
            say(axes, "all updates are zero")
    return figure


def amplification(
    found: Mapping[str, Amplification], title: str = "Amplification: ‖ΔW‖ / ‖UᵀWV‖"
) -> Figure:
    """Bars of ``||dW|| / ||U^T W V||`` with three kinds of directions U and V.

    A large bar for the update's own says that they are there in W, but weak. Of many modules,
    medians and ranges.

    Args:
        found: {module: what rankwise.analysis.amplification_factor gives}.

    Raises:
        ValueError: there are none.
    """
    if not found:
        raise ValueError("amplification: found must have at least one module, got none")
    groups = grouped(found)
    figure, [axes] = new_figure(0.9 + 0.5 * len(groups))
    for place, (kind, label) in enumerate(KINDS.items()):
        bars = []
        for row, names in enumerate(groups.values()):
            own = [_factor(found[name], kind) for name in names]
            own = [factor for factor in own if isfinite(factor) and factor > 0]
            if own:
                bars.append((row + 0.26 * (place - 1), median(own), min(own), max(own)))
        _draw_bars(axes, bars, COLORS[place], label)
    names = [
        literal(label) + (f" ({len(own)})" if len(own) > 1 else "") for label, own in groups.items()
    ]
    axes.set_yticks(range(len(groups)), names)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    dress(axes, title, "factor" if len(groups) == len(found) else "factor (median and range)", "")
    if axes.containers:
        _by_powers(axes.set_xscale, axes.xaxis)
        axes.margins(x=0.1)
    else:
        say(axes, "all updates are zero")
    legend_below(figure, axes)
    return figure


def _draw_bars(axes, bars: list[tuple[float, float, float, float]], color: str, label: str) -> None:
    if not bars:
        return
    rows, middles, lows, highs = zip(*bars, strict=True)
    axes.barh(rows, middles, height=0.24, color=color, label=label)
    axes.hlines(rows, lows, highs, color=INK, linewidth=1)
    for row, middle, high in zip(rows, middles, highs, strict=True):
        axes.annotate(f"{middle:.3g}", (high, row), xytext=(4, 0), textcoords="offset points",
                      va="center", fontsize=7.5, color=INK)  # fmt: skip


def _by_powers(set_scale, axis) -> None:
    """A logarithmic axis with plain numbers."""
    set_scale("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _factor(found: Amplification, kind: str) -> float:
    along = getattr(found, f"along_{kind}")
    return found.update_norm / along if along else float("inf")
