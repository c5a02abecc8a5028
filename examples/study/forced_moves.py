"""Does a training survive ranks that move all the time? Every ten steps half of the adapters lose
one direction of four and the others get one, beside the same training with four each.

`python examples/study/forced_moves.py --help`, in the environment of requirements.txt.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated

import torch
import typer
from methods import Outcome, train_and_measure
from rich.console import Console
from rich.table import Table
from tasks import TASKS, Task
from torch import nn
from tqdm import tqdm

import rankwise as rw

RANK, INTERVAL = 4, 10
console = Console(highlight=False, width=100)


def to_and_fro(question: rw.RankQuestion) -> list[int]:
    """RANK and one less, in turns."""
    turn = question.step // INTERVAL
    return [RANK - (m + turn) % 2 for m in range(len(question.ranks))]


def moved(task: Task, model: nn.Module, moves: bool) -> tuple[nn.Module, rw.SpectralAllocator]:
    config = rw.SpectralConfig(
        initial_rank=RANK, max_rank=RANK, alpha=2.0 * RANK, total_steps=task.steps,
        allocation_interval=INTERVAL if moves else task.steps,
        rule=to_and_fro if moves else lambda question: question.ranks,
        target_modules=task.targets, modules_to_save=task.whole,
    )  # fmt: skip
    rw.apply_lora(model, config)
    return model, rw.SpectralAllocator(model, config)


def main(
    task: Annotated[str, typer.Argument(help=f"One of {', '.join(TASKS)}.")] = "reviews",
    steps: Annotated[int, typer.Option(min=INTERVAL, help="Of each training.")] = 1000,
    rate: Annotated[float, typer.Option(help="Learning rate, which falls to 0.")] = 2e-3,
    seed: Annotated[int, typer.Option(help="Of both trainings.")] = 0,
) -> dict[str, Outcome]:
    """Trains twice, and tells both test accuracies."""
    chosen = dataclasses.replace(TASKS[task](), steps=steps)
    found = {}
    names = {"without moves": False, "moves every 10 steps": True}
    for name, moves in tqdm(names.items(), disable=not sys.stderr.isatty()):
        torch.manual_seed(seed)
        model, allocator = moved(chosen, chosen.new_model(seed), moves)
        found[name] = train_and_measure(chosen, model, allocator, rate, seed)
    table = Table("training", "events", "directions moved", "loss", "accuracy", title=task)
    for name, own in found.items():
        ranks = [ranks for _, ranks in own.events]
        count = sum(abs(a - b) for x, y in zip(ranks, ranks[1:], strict=False)
                    for a, b in zip(x, y, strict=True))  # fmt: skip
        table.add_row(name, str(len(ranks)), str(count), f"{own.loss:.4f}",
                      f"{100 * own.accuracies['test']:.2f} %")  # fmt: skip
    console.print(table)
    return found


if __name__ == "__main__":
    typer.run(main)
