"""`rankwise plan`: AdaLoRA's budget over a training, before it starts."""

from typing import Annotated

import typer

from .._library import library
from ..config import AdaLoRAConfig
from .output import AsJson, answer, table

SHOWN = 12


def plan(
    total_steps: Annotated[int, typer.Option(help="Optimizer steps of the whole training.")],
    initial_rank: Annotated[int, typer.Option(help="Of every adapter at the start.")] = 12,
    target_rank: Annotated[int, typer.Option(help="The mean rank at the end.")] = 8,
    warmup_steps: Annotated[int, typer.Option(help="At the start, that prune nothing.")] = 0,
    final_steps: Annotated[int, typer.Option(help="At the end, with the pattern frozen.")] = 0,
    allocation_interval: Annotated[int, typer.Option(help="Steps between allocations.")] = 1,
    adapters: Annotated[int, typer.Option(min=1, help="How many the model has.")] = 1,
    as_json: AsJson = False,
) -> None:
    """When AdaLoRA prunes, and what it keeps.

    Or what is wrong with the schedule, before the training starts.
    """
    config = AdaLoRAConfig(
        initial_rank=initial_rank, target_rank=target_rank, total_steps=total_steps,
        warmup_steps=warmup_steps, final_steps=final_steps,
        allocation_interval=allocation_interval, target_modules="all-linear",
    )  # fmt: skip
    schedule = library.BudgetSchedule(
        initial_rank * adapters, target_rank * adapters, config.allocation_options()
    )
    steps = [step for step in range(1, total_steps + 1) if schedule.allocates(step)]
    budgets = {step: schedule.budget(step) for step in steps}
    shown = table("step", "triplets kept", "mean rank")
    for step in _spread(steps):
        shown.add_row(str(step), f"{budgets[step]:,}", f"{budgets[step] / adapters:.2f}")
    report = {
        "allocations": len(steps),
        "first": steps[0],
        "frozen_after": total_steps - final_steps,
        "initial_budget": initial_rank * adapters,
        "final_budget": target_rank * adapters,
        "budgets": budgets,
    }
    answer(report, as_json, shown)


def _spread(steps: list[int]) -> list[int]:
    """The first, the last and some between."""
    if len(steps) <= SHOWN:
        return steps
    return [steps[round(i * (len(steps) - 1) / (SHOWN - 1))] for i in range(SHOWN)]
