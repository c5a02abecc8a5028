"""Which way of giving out ranks is best, at equal parameters? Five methods, tuned alike, seeds.

`python examples/study/allocation_study.py --help`, in the environment of requirements.txt. Each
training is written to a file when it ends, so that a study that was stopped goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated

import typer
from figures import draw_ranks, draw_study
from methods import METHODS, run
from results import Results
from rich.console import Console
from rich.table import Table
from scipy.stats import ttest_rel
from tasks import TASKS, Task
from tqdm import tqdm

OUTPUT = Path(__file__).resolve().parents[2] / "build" / "study"
RATES = "1e-3;2e-3;4e-3;8e-3;1.6e-2"
TUNING_SEEDS = (100, 101)  # of the trainings by which the rate is chosen
console = Console(highlight=False, width=120)


def main(
    task: Annotated[str, typer.Argument(help=f"One of {', '.join(TASKS)}.")] = "digits",
    seeds: Annotated[int, typer.Option(min=2, help="Trainings of each method.")] = 5,
    methods: Annotated[str, typer.Option(help="Names, separated by ';'.")] = ";".join(METHODS),
    rates: Annotated[str, typer.Option(help="Learning rates to choose from.")] = RATES,
    output: Annotated[Path, typer.Option(help="Folder of results and the figure.")] = OUTPUT,
) -> dict[str, list[float]]:
    """Chooses a rate for each method on the validation split, then measures on the test split."""
    chosen_task, chosen = TASKS[task](), methods.split(";")
    candidates = [float(rate) for rate in rates.split(";")]
    results = Results(output / f"{task}.jsonl")
    trainings = len(chosen) * (tunings(candidates) + seeds)
    best, found = {}, {}
    with tqdm(total=trainings, disable=not sys.stderr.isatty()) as bar:
        for method in chosen:
            bar.set_description(f"{task}, {method}")

            def outcome(rate: float, seed: int, method: str = method) -> dict:
                key = (chosen_task.name, chosen_task.steps, method, rate, seed)
                bar.update()
                return results.outcome(key, lambda: asdict(run(chosen_task, method, rate, seed)))

            best[method] = best_rate(candidates, outcome)
            found[method] = [outcome(best[method], seed) for seed in range(seeds)]
    accuracies = {name: [o["accuracies"]["test"] for o in own] for name, own in found.items()}
    console.print(table(chosen_task, accuracies, found, best))
    draw_study(task, found, output / f"{task}.png")
    for method, (first, *_) in found.items():
        if first["events"]:
            draw_ranks(task, method, first, output)
    console.print(f"figures: {output / f'{task}*.png'}")
    return accuracies


def tunings(candidates: list[float]) -> int:
    """Trainings by which a method's rate is chosen."""
    return len(candidates) * len(TUNING_SEEDS) if len(candidates) > 1 else 0


def best_rate(candidates: list[float], outcome: Callable[[float, int], dict]) -> float:
    """By the mean accuracy on the validation split, where there is a choice."""
    if not tunings(candidates):
        return candidates[0]
    scores = {
        rate: mean(outcome(rate, seed)["accuracies"]["validation"] for seed in TUNING_SEEDS)
        for rate in candidates
    }
    return max(candidates, key=scores.__getitem__)


def table(
    task: Task, accuracies: dict[str, list[float]], found: dict[str, list[dict]], rates: dict
) -> Table:
    """Means and deviations over seeds; p: that the method is not better than LoRA, one-sided."""
    made = Table(
        "method", "rate", "accuracy", "loss", "over LoRA", "p",
        title=f"{task.name}: {task.steps} steps, mean rank {task.rank}, test split",
    )  # fmt: skip
    reference = accuracies.get("LoRA")
    for name, own in accuracies.items():
        difference = probability = ""
        if reference is not None and name != "LoRA":
            gained = mean(a - b for a, b in zip(own, reference, strict=True))
            difference = f"{100 * gained:+.2f} points"
            if own != reference:
                probability = f"{ttest_rel(own, reference, alternative='greater').pvalue:.3f}"
        loss = mean(outcome["loss"] for outcome in found[name])
        made.add_row(
            name, f"{rates[name]:g}", f"{100 * mean(own):.2f} +- {100 * stdev(own):.2f} %",
            f"{loss:.3f}", difference, probability,
        )  # fmt: skip
    return made


if __name__ == "__main__":
    typer.run(main)
