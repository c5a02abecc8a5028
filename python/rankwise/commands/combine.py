"""`rankwise combine` and `rankwise truncate`: new adapter folders of given ones."""

from pathlib import Path
from typing import Annotated

import typer

from ..analysis import combine_folders, distances
from .output import AsJson, Output, answer, table


def combine(
    folders: Annotated[list[Path], typer.Argument(help="PEFT folders, of LoRA or AdaLoRA.")],
    output: Output,
    weights: Annotated[
        str | None, typer.Option(help="One for each folder, as in 0.7,0.3. Otherwise all are 1.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="linear, ties, dare_linear, dare_ties or magnitude_prune.")
    ] = "linear",
    rank: Annotated[int | None, typer.Option(min=0, help="Of the result at most.")] = None,
    density: Annotated[float, typer.Option(help="The part of elements kept; not linear's.")] = 0.5,
    seed: Annotated[int, typer.Option(min=0, help="Of the elements that dare drops.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Write the weighted sum of adapters.

    They may have any ranks and methods; the sum is a plain LoRA folder of one rank, with scale 1.
    """
    given = [1.0] * len(folders) if weights is None else _numbers(weights)
    combine_folders(
        folders, given, output, method=method, rank=rank, density=density, seed=seed
    )  # fmt: skip
    report = {"written": str(output), "method": method, "folders": list(map(str, folders)),
              "weights": given}  # fmt: skip
    answer(report, as_json)


def truncate(
    folder: Annotated[Path, typer.Argument(help="A PEFT folder, of LoRA or AdaLoRA.")],
    output: Output,
    rank: Annotated[int, typer.Option(min=0, help="Of every module at most.")],
    as_json: AsJson = False,
) -> None:
    """Write the best adapter of a lower rank.

    And tell what it loses in each module. It is a plain LoRA folder, with scale 1.
    """
    combine_folders([folder], [1.0], output, rank=rank)
    lost = distances(folder, output)
    shown = table("module", "lost", "relative")
    for module, distance in lost.items():
        shown.add_row(module, f"{distance.absolute:.4g}", f"{distance.relative:.3g}")
    worst = max((d.relative for d in lost.values()), default=0.0)
    report = {"written": str(output), "rank": rank, "worst_relative_error": worst,
              "relative_errors": {m: d.relative for m, d in lost.items()}}  # fmt: skip
    answer(report, as_json, shown)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"--weights must be numbers separated by commas, got {text!r}"
        ) from None
