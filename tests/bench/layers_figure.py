# The picture of layers.py: time over the frozen layer, for each case and contender.
from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws without a display

from matplotlib import pyplot as plt

COLORS = {
    "frozen, packed": "#2f9e6e",
    "PEFT": "#c4622d",
    "PEFT compiled": "#e0b08f",
    "composition": "#8a8f98",
    "merged each call": "#c8ccd2",
    "rankwise": "#1f6fb4",
}


def draw(results: list[dict], path: Path) -> None:
    """Writes the PNG: a panel for each dtype and dropout, a group of dots for each shape."""
    panels = sorted(
        {(r["case"]["dtype"], r["case"]["dropout"]) for r in results},
        key=lambda p: (p[0] != "float32", p[1]),
    )
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(
            1, len(panels), figsize=(4.2 * len(panels), 4.6), sharey=True, layout="constrained"
        )
        for axis, panel in zip(axes, panels, strict=True):
            _draw_panel(axis, panel, results)
        shown = {name for row in results for name in row["both"]}
        handles = [
            plt.Line2D([], [], marker="o", ls="", color=color, label=name)
            for name, color in COLORS.items()
            if name in shown
        ]
        figure.legend(handles=handles, frameon=False, ncols=len(handles), loc="outside upper left")
        figure.supxlabel(
            "time of forward and backward over the frozen layer's: median and quartiles"
        )
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _draw_panel(axis: plt.Axes, panel: tuple[str, float], results: list[dict]) -> None:
    rows = [r for r in results if (r["case"]["dtype"], r["case"]["dropout"]) == panel]
    labels = ["{tokens}, {n_in}→{n_out}, r {rank}".format(**r["case"]) for r in rows]
    for name, color in COLORS.items():
        for y, own in ((i, r["both"][name]) for i, r in enumerate(rows) if name in r["both"]):
            axis.hlines(y, own["ratio_low"], own["ratio_high"], color=color, linewidth=2.5)
            axis.scatter(own["ratio"], y, color=color, s=30, zorder=3)
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), labels)
    axis.set_ylim(len(rows) - 0.5, -0.5)  # the first on top
    axis.grid(axis="y", color="#eeeeee")
    axis.set_xlim(left=min(0.8, axis.get_xlim()[0]))
    axis.set_title(f"{panel[0]}, dropout {panel[1]:g}", loc="left")
