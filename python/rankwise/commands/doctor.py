"""`rankwise doctor`: what this installation has to work with, as tables."""

from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..doctor import DTYPES, Installation, examine
from ..doctor import measure as measure_paths
from .output import AsJson, answer


def doctor(
    measure: Annotated[
        bool, typer.Option("--measure", help="Also time lora_linear on the CPU's paths.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What this installation has to work with.

    Exits with 1 if it finds a problem.
    """
    found = examine()
    timed = measure_paths() if measure else None
    if as_json:
        paths = None if timed is None else [asdict(path) for path in timed]
        answer({**asdict(found), "timed": paths}, as_json)
    else:
        _show(found, timed)
    if found.problems:
        raise typer.Exit(1)


def _show(found: Installation, timed: list | None) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for what, version in found.versions.items():
        console.print(f"{what:12} {version}")
    console.print(f"{'threads':12} {found.threads} on {found.processors} processors")
    console.print(f"{'CUDA kernels':12} {found.cuda_architectures or 'not in this build'}")
    console.print(_devices(found), _packages(found))
    if timed is not None:
        console.print(_paths(timed))
    for problem in found.problems:
        console.print(f"[red]problem[/red]: {problem}")
    if not found.problems:
        console.print("no problems found")


def _devices(found: Installation) -> Table:
    table = Table("device", "dtype", "path", title="What serves lora_linear", title_justify="left")
    for device in found.devices:
        labels = [device.name, device.description, *[""] * len(DTYPES)]
        for label, dtype in zip(labels, DTYPES, strict=False):
            table.add_row(label, dtype, device.paths[dtype])
    return table


def _packages(found: Installation) -> Table:
    table = Table("package", "found", "tested", title="Optional packages", title_justify="left")
    for name, (version, tested) in found.packages.items():
        table.add_row(name, version or "-", tested)
    return table


def _paths(timed: list) -> Table | str:
    if not timed:
        return "paths        ATen serves all types here, so there is nothing to choose"
    table = Table(title="Milliseconds on the CPU's paths", title_justify="left")
    for column in ("call", "dtype", "tokens, layer, rank", "micro-kernel", "ATen", "ratio"):
        table.add_column(column)
    for path in timed:
        sizes = f"{path.tokens}, {path.n_in} -> {path.n_out}, r {path.rank}"
        times = (path.micro_kernel_ms, path.aten_ms, path.aten_ms / path.micro_kernel_ms)
        table.add_row(path.call, path.dtype, sizes, *(f"{t:.3f}" for t in times))
    return table
