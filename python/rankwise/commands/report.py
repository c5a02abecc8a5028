"""`rankwise report`: an adapter on one page of HTML."""

from pathlib import Path
from typing import Annotated

import typer

from ..html_report import write_report
from .output import AsJson, answer


def report(
    folder: Annotated[Path, typer.Argument(help="A PEFT folder, of LoRA or AdaLoRA.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")],
    history: Annotated[
        Path | None,
        typer.Option(help="What RankHistory.save() wrote; else rank_history.json in the folder."),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="The base model's folder, for what the adapter amplifies.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Of the page.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a page with numbers and pictures.

    One HTML file that needs nothing else: ranks, spectra, effective ranks and health of an adapter,
    and ranks and budget over the training that made it.
    """
    write_report(output, folder, history, model, title)
    answer({"written": str(output), "bytes": output.stat().st_size}, as_json)
