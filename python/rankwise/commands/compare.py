"""`rankwise compare`: whether two adapter folders compute the same function."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..analysis import distances
from .output import AsJson, answer, table


def compare(
    first: Annotated[Path, typer.Argument(help="A PEFT folder, of LoRA or AdaLoRA.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
    tolerance: Annotated[
        float, typer.Option(min=0, help="The largest relative distance that counts as the same.")
    ] = 1e-6,
    as_json: AsJson = False,
) -> None:
    """Whether two adapters compute the same function.

    And how far they lie apart in each module, whatever their ranks and methods. Exits with 1 where
    they compute different functions.
    """
    found = distances(first, second)
    same = all(d.relative <= tolerance for d in found.values())
    shown = table("module", "distance", "relative")
    for module, distance in found.items():
        shown.add_row(module, f"{distance.absolute:.4g}", f"{distance.relative:.3g}")
    report = {
        "same_function": same,
        "tolerance": tolerance,
        "distances": {module: asdict(distance) for module, distance in found.items()},
    }
    answer(report, as_json, shown)
    if not same:
        raise typer.Exit(1)
