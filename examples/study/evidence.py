"""The LoRA paper's questions, asked of MiniLM on film reviews: which matrices, which rank, what do
ranks and seeds share, what does an update amplify?

`python examples/study/evidence.py --help`, in the environment of requirements.txt. Trainings are
written to files when they end, and shared by the commands; what was stopped goes on.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated

import torch
import typer
from allocation_study import OUTPUT
from figures import draw_settings
from rich.console import Console
from rich.table import Table
from settings import SCALING, Setting, Trainings
from tasks import TASKS
from tqdm import tqdm

import rankwise as rw
from rankwise.analysis import Update, amplification_factor, subspace_similarity

QV = ("query", "value")
# MiniLM: as many parameters as one kind of [384, 384] matrices has at rank 8, but in the last.
MATRICES = (
    Setting("q", ("query",), 8),
    Setting("k", ("key",), 8),
    Setting("v", ("value",), 8),
    Setting("o", ("attention.output.dense",), 8),
    Setting("q, k", ("query", "key"), 4),
    Setting("q, v", QV, 4),
    Setting("q, k, v, o", ("query", "key", "value", "attention.output.dense"), 2),
    Setting("all linear", "all-linear", 1),
)
RANKS = tuple(Setting(f"q, v, r = {rank}", QV, rank) for rank in (1, 2, 4, 8, 64))
R4, R8, R64 = RANKS[-3:]
EVERYWHERE = tuple(Setting(f"all linear, r = {rank}", "all-linear", rank) for rank in (1, 4))
Seeds = Annotated[int, typer.Option(min=2, help="Trainings of each setting.")]
Rates = Annotated[str, typer.Option(help="Learning rates to choose from.")]
Only = Annotated[list[str] | None, typer.Option(help="One of the lines alone; may be repeated.")]
Output = Annotated[Path, typer.Option(help="Folder of results and figures.")]
DEFAULT_RATES = "1e-3;2e-3;4e-3;8e-3"
console = Console(highlight=False, width=120)
app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


def trainings(rates: str, output: Path, tick=lambda: None) -> Trainings:
    return Trainings(TASKS["reviews"](), output, [float(r) for r in rates.split(";")], tick)


@app.command()
def matrices(
    seeds: Seeds = 3, rates: Rates = DEFAULT_RATES, only: Only = None, output: Output = OUTPUT
) -> None:
    """Which matrices, at a fixed number of parameters (the paper's table 5)."""
    compare("Which matrices", chosen(MATRICES, only), seeds, rates, output / "matrices.png")


@app.command()
def ranks(
    seeds: Seeds = 3, rates: Rates = DEFAULT_RATES, only: Only = None, output: Output = OUTPUT
) -> None:
    """Which rank (the paper's table 6)."""
    compare("Which rank", chosen(RANKS, only), seeds, rates, output / "ranks.png")


def chosen(settings: tuple[Setting, ...], only: list[str] | None) -> tuple[Setting, ...]:
    """Those of these names, or all."""
    names = [setting.name for setting in settings]
    unknown = [name for name in only or () if name not in names]
    if unknown:
        raise typer.BadParameter(f"lines are {', '.join(map(repr, names))}, got {unknown[0]!r}")
    return tuple(setting for setting in settings if not only or setting.name in only)


def compare(
    title: str, settings: tuple[Setting, ...], seeds: int, rates: str, figure: Path
) -> dict[str, list[dict]]:
    """Trains each setting, prints the table and draws the figure."""
    with tqdm(disable=not sys.stderr.isatty()) as bar:
        made = trainings(rates, figure.parent, bar.update)
        bar.total = len(settings) * made.count(seeds)
        found = {setting.name: made.outcomes(setting, seeds) for setting in settings}
    caption = f"{title}: {made.task.steps} steps, alpha / r = {SCALING:g}, test split"
    shown = Table("", "rank", "parameters", "rate", "accuracy", "loss", title=caption)
    for setting, own in zip(settings, found.values(), strict=True):
        values = [100 * outcome["accuracies"]["test"] for outcome in own]
        loss = mean(outcome["loss"] for outcome in own)
        accuracy = f"{mean(values):.2f} +- {stdev(values):.2f} %"
        parameters, rate = f"{setting.parameters(made.task):,}", f"{made.rate(setting):g}"
        shown.add_row(setting.name, str(setting.rank), parameters, rate, accuracy, f"{loss:.3f}")
    console.print(shown)
    draw_settings(title, found, figure)
    console.print(f"figure: {figure}")
    return found


@app.command()
def everywhere(seeds: Seeds = 3, rates: Rates = DEFAULT_RATES, output: Output = OUTPUT) -> None:
    """Whether more directions in all linear layers help."""
    compare("How many directions", EVERYWHERE, seeds, rates, output / "everywhere.png")


@app.command()
def subspaces(rates: Rates = DEFAULT_RATES, output: Output = OUTPUT) -> None:
    """What r = 8 and r = 64, and two seeds of r = 64, share (figures 3 and 4)."""
    made = trainings(rates, output)
    r8, r64, other = made.adapter(R8, 0), made.adapter(R64, 0), made.adapter(R64, 1)
    pairs = {"r = 8, r = 64": (r8, r64), "r = 64, two seeds": (r64, other)}
    shown = Table("", "", *(f"phi({i}, {i})" for i in (1, 2, 4, 8)),
                  title="Subspaces of the inputs, mean over layers (least to most)")  # fmt: skip
    for name, (first, second) in pairs.items():
        for kind in QV:
            own = [module for module in first if module.endswith(kind)]
            phi = torch.stack([subspace_similarity(first[m], second[m])[:8, :8] for m in own])
            shown.add_row(name, kind, *(_spread(phi[:, i - 1, i - 1]) for i in (1, 2, 4, 8)))
    width = r8[next(iter(r8))].lora_A.shape[1]
    shown.add_row("random directions", "", *(f"{i / width:.3f}" for i in (1, 2, 4, 8)))
    console.print(shown)
    middle = list(r8)[len(r8) // 2]
    for place, (first, second) in enumerate(pairs.values()):
        labels = ("r = 8", "r = 64") if place == 0 else ("r = 64, seed 0", "r = 64, seed 1")
        figure = rw.plots.similarity_grid(
            subspace_similarity(first[middle], second[middle]), *labels
        )
        figure.savefig(output / f"subspaces_{place}.png", dpi=110)
        console.print(f"figure: {output / f'subspaces_{place}.png'} of {middle}")


@app.command()
def amplification(rates: Rates = DEFAULT_RATES, output: Output = OUTPUT) -> None:
    """What an update amplifies (the paper's table 7)."""
    made = trainings(rates, output)
    base = made.task.new_model(0)
    for setting in (R4, R64):
        updates = made.adapter(setting, 0)
        found = {
            module: amplification_factor(base.get_submodule(module).weight, update)
            for module, update in updates.items()
        }
        console.print(_amplified(setting, updates, found))
        path = output / f"amplification_{setting.rank}.png"
        rw.plots.amplification(found).savefig(path, dpi=110)
        console.print(f"figure: {path}")


def _amplified(setting: Setting, updates: dict[str, Update], found: dict) -> Table:
    made = Table("", "|W|", "|dW|", "W along dW's", "along W's own", "along random", "factor",
                 title=f"{setting.name}: norms, mean over layers (least to most)")  # fmt: skip
    for kind in QV:
        own = [values for module, values in found.items() if module.endswith(kind)]
        columns = ("weight_norm", "update_norm", "along_update", "along_weight", "along_random",
                   "factor")  # fmt: skip
        made.add_row(kind, *(_spread(torch.tensor([getattr(x, c) for x in own])) for c in columns))
    return made


def _spread(values: torch.Tensor) -> str:
    return f"{values.mean():.3g} ({values.min():.3g} to {values.max():.3g})"


if __name__ == "__main__":
    app()
