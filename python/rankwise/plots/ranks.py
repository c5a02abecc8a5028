"""Ranks by layer and projection, and ranks over a training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import nan
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .groups import place_of, stem_of
from .lines import draw_lines
from .look import MAP, add_scale, dress, literal, new_figure

WRITTEN = 24  # columns at most whose cells have their rank written in them
ROWS = 120  # at most that are a line of text high
NAMED = 48  # columns at most that are named


def rank_map(ranks: Mapping[str, int], title: str = "Rank of each module") -> Figure:
    """A heat map of ranks, layers by projections, as the names tell.

    ``encoder.layer.3.attention.query`` is in the row of layer 3 and the column ``attention.query``;
    names without a number have rows of their own.

    Args:
        ranks: {module: rank}, such as ``allocator.ranks``.

    Raises:
        ValueError: there are none.
    """
    if not ranks:
        raise ValueError("rank_map: ranks must have at least one module, got none")
    places = {place_of(name): rank for name, rank in ranks.items()}
    rows = _in_order(row for row, _ in places)
    columns = list(dict.fromkeys(column for _, column in places))
    values = [[places.get((row, column), nan) for column in columns] for row in rows]
    figure, [axes] = new_figure(1.1 + 0.24 * min(max(len(rows), 2), ROWS))
    image = axes.imshow(values, cmap=MAP, vmin=0, vmax=max(1, *ranks.values()), aspect="auto",
                        interpolation="nearest")  # fmt: skip
    stems = {stem_of(row)[0] for row in rows}
    label = "layer" if len(stems) > 1 else literal(next(iter(stems))) or "layer"
    dress(axes, title, "", label if len(rows) > 1 else "")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if len(stems) == 1 and len(rows) > 1:
        rows = [row.rpartition(".")[2] for row in rows]
    _name(axes, rows, columns)
    if len(columns) <= WRITTEN and len(rows) <= ROWS:
        _write(axes, values, max(1, *ranks.values()))
    add_scale(figure, image, [axes], "rank", MaxNLocator(6, integer=True))
    return figure


def ranks_over_time(
    history: Sequence, names: Iterable[str] = (), title: str = "Ranks over the training"
) -> Figure:
    """Lines of ranks over optimizer steps, of few modules; of many, means and ranges.

    Args:
        history: of a RankAllocator or SpectralAllocator: events with ``step`` and ``ranks``.
        names: of the modules, such as ``allocator.ranks``; otherwise they are numbered.

    Raises:
        ValueError: the history is empty yet, or the names are not as many as its ranks.
    """
    if not len(history):
        raise ValueError(
            "ranks_over_time: history must have at least one event, got none: ranks were not "
            "allocated yet"
        )
    count = len(history[0].ranks)
    names = list(names) or [f"adapter {i}" for i in range(count)]
    if len(names) != count:
        raise ValueError(f"ranks_over_time: names must be {count}, got {len(names)}")
    by_module = zip(*(event.ranks for event in history), strict=True)
    series = dict(zip(names, by_module, strict=True))
    steps = [event.step for event in history]
    figure, panels = draw_lines(steps, series, title, ("optimizer step", "rank"), mean, held=True)
    for axes in panels:
        axes.set_ylim(bottom=0)
        axes.locator_params(axis="y", integer=True)
    return figure


def _in_order(rows: Iterable[str]) -> list[str]:
    """Layers by their numbers, and otherwise as they came."""
    rows = list(dict.fromkeys(rows))
    stems = list(dict.fromkeys(stem_of(row)[0] for row in rows))
    return sorted(rows, key=lambda row: (stems.index(stem_of(row)[0]), stem_of(row)[1]))


def _name(axes: Axes, rows: list[str], columns: list[str]) -> None:
    thin = -(-len(rows) // ROWS)
    axes.set_yticks(range(0, len(rows), thin), map(literal, rows[::thin]))
    if columns == [""]:
        axes.set_xticks([])
    else:
        thin = -(-len(columns) // NAMED)
        axes.set_xticks(range(0, len(columns), thin), map(literal, columns[::thin]), rotation=35,
                        ha="right", rotation_mode="anchor")  # fmt: skip


def _write(axes: Axes, values: list[list[float]], largest: int) -> None:
    for row, own in enumerate(values):
        for column, rank in enumerate(own):
            if rank == rank:
                color = "black" if rank > 0.45 * largest else "white"
                axes.text(column, row, rank, ha="center", va="center", color=color, fontsize=8)
