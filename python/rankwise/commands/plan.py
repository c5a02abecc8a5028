"""`rankwise plan`: AdaLoRA's budget over a training, and what it costs, before it starts."""

from dataclasses import asdict
from pathlib import Path
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
    adapters: Annotated[
        int, typer.Option(min=1, help="How many the model has, where --model does not tell.")
    ] = 1,
    model: Annotated[
        Path | None, typer.Option(help="A model's folder, by transformers: adds what it costs.")
    ] = None,
    targets: Annotated[
        str, typer.Option(help="Modules of --model to adapt, as in q_proj,v_proj.")
    ] = "all-linear",
    tokens: Annotated[int, typer.Option(min=1, help="Of a batch, for the costs.")] = 2048,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time layers of --model's sizes on this CPU.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """When AdaLoRA prunes, what it keeps and costs.

    Or what is wrong with the schedule, before the training starts. Costs are at the initial rank:
    parameters, memory beside activations of the base, arithmetic; no weight is read.
    """
    if measure and model is None:
        raise typer.BadParameter("--measure needs --model")
    modules = targets if targets == "all-linear" else targets.split(",")
    config = AdaLoRAConfig(
        initial_rank=initial_rank, target_rank=target_rank, total_steps=total_steps,
        warmup_steps=warmup_steps, final_steps=final_steps,
        allocation_interval=allocation_interval, target_modules=modules,
    )  # fmt: skip
    costs = {} if model is None else _costs(model, config, tokens, measure)
    count = costs.get("adapters", adapters)
    schedule = library.BudgetSchedule(
        initial_rank * count, target_rank * count, config.allocation_options()
    )
    steps = [step for step in range(1, total_steps + 1) if schedule.allocates(step)]
    budgets = {step: schedule.budget(step) for step in steps}
    shown = table("step", "triplets kept", "mean rank")
    for step in _spread(steps):
        shown.add_row(str(step), f"{budgets[step]:,}", f"{budgets[step] / count:.2f}")
    report = {
        "allocations": len(steps),
        "first": steps[0],
        "frozen_after": total_steps - final_steps,
        "initial_budget": initial_rank * count,
        "final_budget": target_rank * count,
        **costs,
        "budgets": budgets,
    }
    answer(report, as_json, shown)


def _costs(folder: Path, config: AdaLoRAConfig, tokens: int, measure: bool) -> dict:
    from ..model import apply_lora
    from ..model_folder import read_model_folder
    from ..training_costs import step_times, training_costs

    model = apply_lora(read_model_folder(folder).empty_model(), config)
    found = asdict(training_costs(model, tokens))
    if measure:
        times = step_times(model, tokens)
        found |= {"frozen_seconds": times.frozen, "adapted_seconds": times.adapted}
    return found


def _spread(steps: list[int]) -> list[int]:
    """The first, the last and some between."""
    if len(steps) <= SHOWN:
        return steps
    return [steps[round(i * (len(steps) - 1) / (SHOWN - 1))] for i in range(SHOWN)]
