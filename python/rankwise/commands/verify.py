"""`rankwise verify`: whether an adapter's folder is whole and usable."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..verification import verify_folder
from .output import AsJson, answer


def verify(
    folder: Annotated[Path, typer.Argument(help="A PEFT folder, of LoRA or AdaLoRA.")],
    model: Annotated[
        Path | None,
        typer.Option(help="A model's folder, by transformers: whether the adapter fits it."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Whether an adapter's folder is whole and usable.

    Its files, checksums, configuration against tensors, values; with a model names and shapes, of
    whose files the headers alone are read. Exits with 1 where there is a problem.
    """
    checks = verify_folder(folder, model)
    sound = all(check.ok for check in checks)
    width = max(len(check.name) for check in checks)
    lines = (f"{c.name:{width}}  {'ok' if c.ok else 'problem':7}  {c.found}" for c in checks)
    answer(
        {"sound": sound, "checks": [asdict(check) for check in checks]}, as_json, "\n".join(lines)
    )
    if not sound:
        raise typer.Exit(1)
