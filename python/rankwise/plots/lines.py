"""Lines of modules in one panel; of many modules a panel for each projection."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .groups import grouped
from .look import COLORS, INK, MARKERS, dress, grid, legend_below, literal, new_figure

ACROSS = 3  # panels


def draw_lines(
    x: Sequence[float],
    series: Mapping[str, Sequence[float]],
    title: str,
    labels: tuple[str, str],
    middle: Callable[[list[float]], float],
    held: bool = False,
) -> tuple[Figure, list[Axes]]:
    """A line for each module; for many a panel for each group, its middle within its range.

    Args:
        x: as long as the longest of the series, which may end earlier.
        labels: of both axes.
        held: whether values hold until the next one.
    """
    groups = grouped(series)
    if len(groups) == len(series):
        figure, [axes] = new_figure(3.0)
        for (name, values), color, marker in zip(series.items(), COLORS, MARKERS, strict=False):
            _draw(axes, x, values, held, color=color, marker=marker, label=literal(name))
        dress(axes, title, *labels)
        grid(axes)
        legend_below(figure, axes)
        return figure, [axes]
    across, down = min(ACROSS, len(groups)), -(-len(groups) // ACROSS)
    figure, panels = new_figure(0.7 + 1.75 * down, (down, across), share=True)
    for axes in panels[len(groups) :]:
        axes.remove()
    for axes in panels[max(len(groups) - across, 0) : len(groups)]:
        axes.tick_params(labelbottom=True)  # also where the row below ends earlier
    for axes, (label, names) in zip(panels, groups.items(), strict=False):
        found = [series[name] for name in names]
        columns = [[v for v in own if v is not None] for own in zip_longest(*found)]
        lows, highs = ([pick(own) for own in columns] for pick in (min, max))
        axes.fill_between(x[: len(columns)], lows, highs, color=COLORS[0], alpha=0.25, linewidth=0,
                          step="post" if held else None)  # fmt: skip
        _draw(axes, x, [middle(own) for own in columns], held, color=COLORS[0], marker="o")
        dress(axes, "", "", "")
        many = "" if label.endswith(" others") else f" ({len(names)})"
        axes.set_title(literal(label) + many, loc="left", fontsize=8.5, color=INK)
        grid(axes)
    figure.suptitle(f"{title}: {middle.__name__} and range of modules", x=0.01, ha="left",
                    fontsize=10.5, color=INK)  # fmt: skip
    figure.supxlabel(labels[0], fontsize=9, color=INK)
    figure.supylabel(labels[1], fontsize=9, color=INK)
    return figure, panels[: len(groups)]


def _draw(axes: Axes, x: Sequence[float], values: Sequence[float], held: bool, **style) -> None:
    axes.plot(
        x[: len(values)], values, markersize=4, markevery=max(1, len(values) // 8), linewidth=1.6,
        drawstyle="steps-post" if held else "default", **style,
    )  # fmt: skip
