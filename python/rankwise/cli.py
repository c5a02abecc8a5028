"""The command line. Needs typer and rich, which the library does without."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .doctor import DTYPES, Installation, examine

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()
def options(
    cmake_dir: Annotated[
        bool, typer.Option("--cmake-dir", help="Print where CMake finds the C++ package (alone).")
    ] = False,
) -> None:
    """LoRA and AdaLoRA for PyTorch."""
    if cmake_dir:
        raise typer.BadParameter("--cmake-dir stands alone, without a command")


@app.command()
def doctor() -> None:
    """Says what this installation has to work with. Exits with 1 if it finds a problem."""
    found = examine()
    console = Console(highlight=False, soft_wrap=True)
    for what, version in found.versions.items():
        console.print(f"{what:12} {version}")
    console.print(f"{'threads':12} {found.threads} on {found.processors} processors")
    console.print(f"{'CUDA kernels':12} {found.cuda_architectures or 'not in this build'}")
    console.print(_devices(found), _packages(found))
    for problem in found.problems:
        console.print(f"[red]problem[/red]: {problem}")
    if found.problems:
        raise typer.Exit(1)
    console.print("no problems found")


def _devices(found: Installation) -> Table:
    table = Table("device", "", *DTYPES, title="What serves lora_linear", title_justify="left")
    for device in found.devices:
        table.add_row(device.name, device.description, *(device.paths[d] for d in DTYPES))
    return table


def _packages(found: Installation) -> Table:
    table = Table("package", "found", "tested", title="Optional packages", title_justify="left")
    for name, (version, tested) in found.packages.items():
        table.add_row(name, version or "-", tested)
    return table
