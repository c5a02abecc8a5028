# The picture of growth.py: milliseconds, and the ratio to frozen, against each size.
from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws without a display

from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator

LINES = {
    "frozen": {"color": "#8a8f98"},
    "PEFT": {"color": "#c4622d"},
    "rankwise": {"color": "#1f6fb4"},
    "PEFT AdaLoRA": {"color": "#c4622d", "linestyle": "--"},
    "rankwise AdaLoRA": {"color": "#1f6fb4", "linestyle": "--"},
}
FLOOR = {"color": "black", "linewidth": 1.0, "linestyle": ":"}


def draw(report: dict[str, list[dict]], fixed: dict[str, str], title: str, path: Path) -> None:
    """Writes the PNG: a column for each sweep, milliseconds above, ratios below."""
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure, axes = plt.subplots(
            2, len(report), figsize=(3.6 * len(report), 6.4), sharex="col", layout="constrained"
        )
        for (upper, lower), (sweep, rows) in zip(axes.T, report.items(), strict=True):
            _draw_sweep(upper, lower, rows)
            upper.set_title(f"{sweep}\n", loc="left", fontweight="bold")
            upper.text(0, 1.02, fixed[sweep], transform=upper.transAxes, color="#555555")
            lower.set_xlabel(sweep)
        axes[0, 0].set_ylabel("milliseconds")
        axes[1, 0].set_ylabel("over the frozen layer")
        handles = [plt.Line2D([], [], label=name, **line) for name, line in LINES.items()]
        handles.append(plt.Line2D([], [], label="FLOP floor", **FLOOR))
        figure.legend(handles=handles, frameon=False, ncols=len(handles), loc="outside lower left")
        figure.suptitle(f"Forward and backward, {title}", x=0.01, ha="left")
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _draw_sweep(upper: plt.Axes, lower: plt.Axes, rows: list[dict]) -> None:
    sizes = [row["size"] for row in rows]
    for name in rows[0]["times"]:
        own = [row["times"][name] for row in rows]
        upper.plot(sizes, [t["median"] for t in own], marker=".", **LINES[name])
        if name != "frozen":
            lower.plot(sizes, [t["ratio"] for t in own], marker=".", **LINES[name])
            low, high = ([t[q] for t in own] for q in ("ratio_low", "ratio_high"))
            lower.fill_between(sizes, low, high, color=LINES[name]["color"], alpha=0.15, lw=0)
    if "floor" in rows[0]:
        lower.plot(sizes, [row["floor"] for row in rows], **FLOOR)
    lower.axhline(1.0, color=LINES["frozen"]["color"])
    upper.set_xscale("log", base=2)
    upper.set_yscale("log")
    low, high = upper.get_ylim()
    upper.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7) if high < 20 * low else (1, 3)))
    upper.yaxis.set_major_formatter(lambda ms, _: f"{ms:g}")
    lower.set_xticks(sizes, [str(size) for size in sizes])
    for axis in (upper, lower):
        axis.minorticks_off()
        axis.grid(axis="y", color="#eeeeee")
