"""The figures: losses and accuracies of all runs; four adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")  # draws without a display

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from training import BATCH_SIZE, Run

WINDOW = 25  # steps averaged in the curves
COLORS = ("#8a8f98", "#1f6fb4", "#c4622d")  # of the runs, in their order
STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}


def draw_training(runs: dict[str, list[Run]], path: Path) -> None:
    """Writes the PNG: the first seeds' losses, the mean accuracies of all seeds."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(11, 4.2), width_ratios=(1.25, 1), layout="constrained"
        )
        adapters = list(zip(runs.items(), COLORS, strict=True))[1:]
        for (name, own), color in adapters:
            _draw_losses(left, name, own[0], color)
        _finish_losses(left)
        _draw_accuracies(right, runs)
        _save(figure, path)


def draw_accuracies_of_kinds(
    accuracies: list[list[float]], kinds: Sequence[str], path: Path
) -> None:
    """Writes the PNG: the accuracy of each adapter (row) on each kind of text (column)."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.2, 4.4), layout="constrained")
        values = np.array(accuracies)
        low, high = values.min(), values.max()
        axes.imshow(values, cmap="Blues", vmin=low - 0.02, vmax=high, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            color = "white" if value > (low + high) / 2 else "black"
            text = f"{100 * value:.1f} %"
            axes.text(column, row, text, ha="center", va="center", color=color)
        axes.set_xticks(range(len(kinds)), kinds)
        axes.set_yticks(range(len(kinds)), kinds)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("texts")
        axes.set_ylabel("adapter")
        axes.set_title("Accuracy of four adapters over one encoder", loc="left")
        _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_losses(axes: Axes, name: str, run: Run, color: str) -> None:
    losses = np.array(run.losses)
    window = min(WINDOW, len(losses))
    smooth = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    middle = np.arange(len(smooth)) + (window + 1) / 2
    axes.plot(np.arange(1, len(losses) + 1), losses, color=color, linewidth=0.5, alpha=0.25)
    axes.plot(middle, smooth, color=color, linewidth=2, label=name)
    axes.set_xlim(0, len(losses))


def _finish_losses(axes: Axes) -> None:
    axes.set_title(f"Training loss (thick: mean of {WINDOW} steps)", loc="left")
    axes.set_xlabel(f"step ({BATCH_SIZE} snippets each)")
    axes.set_ylabel("cross-entropy (nats)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="lower left")


def _draw_accuracies(axes: Axes, runs: dict[str, list[Run]]) -> None:
    bars = []
    for (name, own), color in zip(runs.items(), COLORS, strict=True):
        epochs = list(zip(*(run.accuracies for run in own), strict=True))
        for epoch, values in enumerate(epochs, 1):
            label = name if len(epochs) == 1 else f"{name},\nepoch {epoch}"
            bars.append((label, 100 * mean(values), color))
    names, percent, colors = zip(*bars, strict=True)
    # From 50 %, which is what guessing gives: the classes are of equal size.
    drawn = axes.barh(names, [value - 50 for value in percent], left=50, color=colors, height=0.6)
    axes.bar_label(drawn, [f"{value:.1f} %" for value in percent], padding=4)
    axes.invert_yaxis()
    axes.set_xlim(50, 100)
    axes.tick_params(axis="y", length=0)
    count = len(next(iter(runs.values())))
    seeds = f", mean of {count} seeds" if count > 1 else ""
    axes.set_title(f"Held-out accuracy{seeds}", loc="left")
    axes.set_xlabel("right answers (%; guessing gives 50 %)")
