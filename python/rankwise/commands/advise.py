"""`rankwise advise`: a rank for each matrix, from one trained adapter or two."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..analysis import rank_advice, seed_agreement, update_energies
from .output import AsJson, answer, table


def advise(
    folder: Annotated[Path, typer.Argument(help="A trained PEFT folder, of LoRA or AdaLoRA.")],
    other: Annotated[
        Path | None, typer.Argument(help="The same training from another seed.")
    ] = None,
    budget: Annotated[
        int | None, typer.Option(help="Of all ranks together, in parameters.")
    ] = None,
    mean_rank: Annotated[
        float | None, typer.Option(help="In its place: what this rank for all would cost.")
    ] = None,
    min_rank: Annotated[int, typer.Option(min=0, help="Of every matrix.")] = 1,
    max_rank: Annotated[int | None, typer.Option(min=0, help="Of every matrix.")] = None,
    of: Annotated[
        Literal["input", "output"], typer.Option(help="With OTHER: whose directions must agree.")
    ] = "input",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A file for the rank_pattern, as JSON.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """A rank for each matrix within a budget.

    From the energy of an adapter's directions, or with another folder from how many directions
    both seeds agree on beyond chance. The rank_pattern is what LoRAConfig and PEFT take.
    """
    if (budget is None) == (mean_rank is None):
        raise typer.BadParameter("one of --budget and --mean-rank must be given")
    evidence = update_energies(folder) if other is None else seed_agreement(folder, other, of)
    advice = rank_advice(
        evidence, budget=budget, mean_rank=mean_rank, min_rank=min_rank, max_rank=max_rank
    )
    if output is not None:
        output.write_text(json.dumps(advice.rank_pattern, indent=2) + "\n")
    shown = table("module", "out x in", "rank", "parameters", advice.meaning)
    for module, rank in advice.ranks.items():
        out, n_in = advice.sizes[module]
        score = f"{advice.scores[module]:.4g}"
        shown.add_row(module, f"{out} x {n_in}", str(rank), f"{rank * (out + n_in):,}", score)
    report = {
        "evidence": advice.meaning,
        "budget": advice.budget,
        "spent": advice.spent,
        "written": None if output is None else str(output),
        "rank_pattern": advice.rank_pattern,
        "exclude_modules": advice.exclude_modules,
        "modules": {
            m: {"rank": rank, "score": advice.scores[m]} for m, rank in advice.ranks.items()
        },
    }
    answer(report, as_json, shown)
