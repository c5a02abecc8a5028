"""How pictures look: a page's width, colours that all eyes tell apart, names as they are."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

WIDTH = 7.0  # inches
INK = "#262626"  # of all text and frames
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5C00", "#8A8F98")
MARKERS = "osD^vP*X"
MAP = "cividis"
LONGEST = 40  # characters of a name
LONGEST_SCALE = 2.5  # inches


def new_figure(
    height: float, panels: tuple[int, int] = (1, 1), share: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of the usual width, and its panels row by row; height in inches."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")
    axes = figure.subplots(*panels, squeeze=False, sharex=share, sharey=share)
    return figure, list(axes.flat)


def grid(axes: Axes, direction: str = "y") -> None:
    axes.grid(axis=direction, color=INK, alpha=0.12, linewidth=0.6)


def dress(axes: Axes, title: str, x: str, y: str) -> None:
    """Title and labels; `x` and `y` say what is along the axes, with the unit."""
    axes.set_title(title, loc="left", fontsize=10.5, color=INK)
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    axes.tick_params(colors=INK, labelcolor=INK, labelsize=8)
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)


def legend_below(figure: Figure, axes: Axes) -> None:
    """What the labelled lines and areas of the axes are, in as many columns as fit."""
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, min(4, len(labels), 110 // (max(map(len, labels), default=0) + 8)))
    height = 0.2 * -(-len(labels) // columns)
    figure.set_figheight(figure.get_figheight() + height)
    figure.legend(
        handles, labels, loc="outside lower left", ncols=columns, fontsize=8, frameon=False,
        labelcolor=INK,
    )  # fmt: skip


def add_scale(figure: Figure, colors: ScalarMappable, axes: list[Axes], label: str, ticks) -> None:
    """What the colours of heat maps mean, at their right."""
    height = figure.get_figheight()
    part = min(1.0, LONGEST_SCALE / height)
    bar = figure.colorbar(
        colors, ax=axes, pad=0.02, aspect=8 * part * height, shrink=part, anchor=(0, 1), ticks=ticks
    )
    bar.set_label(label, fontsize=9, color=INK)
    bar.ax.tick_params(colors=INK, labelsize=8)
    bar.outline.set_visible(False)


def say(axes: Axes, text: str) -> None:
    """In the place of what is not there to be drawn."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=9,
              color=INK)  # fmt: skip


def literal(name: str) -> str:
    """A name as text: not too long, no formula where it has dollars, hidden by no underscore."""
    if len(name) > LONGEST:
        name = name[: LONGEST // 3] + "…" + name[len(name) + 1 + LONGEST // 3 - LONGEST :]
    return " " * name.startswith("_") + name.replace("$", r"\$")
