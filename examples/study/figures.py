"""The studies' figures: accuracies of all seeds, and the ranks that allocators gave."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # draws without a display

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from rankwise import plots

STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}


def draw_study(task: str, found: dict[str, list[dict]], path: Path) -> None:
    """Writes the PNG: test accuracies by method, and ranks over steps of the first seed."""
    moved = {name: own for name, own in found.items() if own[0]["events"]}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, 1 + len(moved), figsize=(5.2 + 3.8 * len(moved), 4.4), layout="constrained",
            squeeze=False,
        )  # fmt: skip
        _draw_accuracies(axes[0, 0], task, found)
        for place, (name, own) in zip(axes[0, 1:], moved.items(), strict=True):
            _draw_ranks(place, name, own[0])
        figure.savefig(path, dpi=150)
        plt.close(figure)


class Event(NamedTuple):
    step: int
    ranks: list[int]


def draw_ranks(task: str, method: str, outcome: dict, folder: Path) -> None:
    """Writes PNGs of a training: its last ranks, layers by projections, and lines over steps."""
    history = [Event(*event) for event in outcome["events"]]
    title = f"{task}, {method}"
    drawn = {
        "map": plots.rank_map(outcome["ranks"], f"Ranks at the end: {title}"),
        "lines": plots.ranks_over_time(history, outcome["ranks"], f"Ranks: {title}"),
    }
    words = "_".join(method.replace(",", "").split())
    for kind, figure in drawn.items():
        figure.savefig(folder / f"{task}_{words}_{kind}.png", dpi=110)


def draw_settings(title: str, found: dict[str, list[dict]], path: Path) -> None:
    """Writes the PNG: test accuracies by setting."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
        _draw_accuracies(axes, title, found)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _draw_accuracies(axes: Axes, title: str, found: dict[str, list[dict]]) -> None:
    adapted = {name: own for name, own in found.items() if name != "frozen"}
    for place, own in enumerate(adapted.values()):
        values = [100 * outcome["accuracies"]["test"] for outcome in own]
        axes.plot([place] * len(values), values, "o", color="#1f6fb4", alpha=0.5)
        axes.plot([place - 0.25, place + 0.25], [mean(values)] * 2, color="#c4622d", linewidth=2)
    axes.set_xticks(range(len(adapted)), adapted, rotation=20, ha="right")
    axes.set_ylabel("accuracy on the test split, %")
    axes.set_title(f"{title}: seeds, and their mean")


def _draw_ranks(axes: Axes, name: str, outcome: dict) -> None:
    """Rows are layers, columns events."""
    steps = [step for step, _ in outcome["events"]]
    ranks = np.array([own for _, own in outcome["events"]]).T
    image = axes.imshow(
        ranks, aspect="auto", cmap="Blues", vmin=0, interpolation="nearest",
        extent=(0, len(steps), len(ranks), 0),
    )  # fmt: skip
    shown = range(0, len(steps), max(len(steps) // 5, 1))
    axes.set_xticks([i + 0.5 for i in shown], [steps[i] for i in shown])
    names = list(outcome["ranks"])
    if len(names) <= 12:
        axes.set_yticks([i + 0.5 for i in range(len(names))], names)
    axes.set_xlabel("step of the event")
    axes.set_ylabel("layer")
    axes.set_title(f"ranks, {name}")
    axes.figure.colorbar(image, ax=axes, label="rank")
