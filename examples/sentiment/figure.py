"""The figure: LoRA's loss during training, and its accuracy beside the frozen encoder's."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")  # draws without a display

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from training import BATCH_SIZE, Run

WINDOW = 25  # steps averaged in the smooth curve
LORA_COLOR, FROZEN_COLOR, FAINT = "#1f6fb4", "#8a8f98", "#c9dbea"


def draw(heads: list[Run], loras: list[Run], path: Path) -> None:
    """Writes the PNG: the first seed's losses, the mean accuracies of all seeds."""
    with plt.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(11, 4.2), width_ratios=(1.25, 1), layout="constrained"
        )
        _draw_losses(left, loras[0])
        _draw_accuracies(right, heads, loras)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _draw_losses(axes: Axes, run: Run) -> None:
    losses = np.array(run.losses)
    window = min(WINDOW, len(losses))
    smooth = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    axes.plot(np.arange(1, len(losses) + 1), losses, color=FAINT, linewidth=0.8, label="each step")
    middle = np.arange(len(smooth)) + (window + 1) / 2
    label = f"mean of {window} steps"
    axes.plot(middle, smooth, color=LORA_COLOR, linewidth=2, label=label)
    epochs = len(run.accuracies)
    for epoch in range(1, epochs):
        axes.axvline(epoch * len(losses) / epochs, color=FROZEN_COLOR, linewidth=0.8, linestyle=":")
    axes.set_title("LoRA training loss", loc="left")
    axes.set_xlabel(f"step ({BATCH_SIZE} snippets each; dotted line: end of an epoch)")
    axes.set_ylabel("cross-entropy (nats)")
    axes.set_xlim(0, len(losses))
    axes.set_ylim(0, 1.05 * float(losses.max()))
    axes.legend(frameon=False, loc="lower left")


def _draw_accuracies(axes: Axes, heads: list[Run], loras: list[Run]) -> None:
    bars = [("frozen encoder\n+ head", mean(run.accuracy for run in heads), FROZEN_COLOR)]
    for epoch, values in enumerate(zip(*(run.accuracies for run in loras), strict=True), 1):
        bars.append((f"LoRA\nafter epoch {epoch}", mean(values), LORA_COLOR))
    names, values, colors = zip(*bars, strict=True)
    percent = [100 * value for value in values]
    # From 50 %, which is what guessing gives: the classes are of equal size.
    drawn = axes.barh(names, [value - 50 for value in percent], left=50, color=colors, height=0.6)
    axes.bar_label(drawn, [f"{value:.1f} %" for value in percent], padding=4)
    axes.invert_yaxis()
    axes.set_xlim(50, 100)
    axes.tick_params(axis="y", length=0)
    seeds = f", mean of {len(loras)} seeds" if len(loras) > 1 else ""
    axes.set_title(f"Accuracy on held-out snippets{seeds}", loc="left")
    axes.set_xlabel("right answers (%; guessing gives 50 %)")
