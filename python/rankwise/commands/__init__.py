"""The command line, one module a command. Needs typer and rich, which the library does without."""

from typing import Annotated

import typer

from .advise import advise
from .analyze import analyze
from .combine import combine, truncate
from .compare import compare
from .doctor import doctor
from .export import export
from .inspect import inspect
from .merge import merge
from .output import Commands
from .plan import plan
from .plot import plot
from .report import report
from .sweep import sweep
from .verify import verify

app = typer.Typer(no_args_is_help=True, cls=Commands, rich_markup_mode=None)


@app.callback()
def options(
    cmake_dir: Annotated[
        bool, typer.Option("--cmake-dir", help="Print where CMake finds the C++ package (alone).")
    ] = False,
) -> None:
    """LoRA and AdaLoRA for PyTorch."""
    if cmake_dir:
        raise typer.BadParameter("--cmake-dir stands alone, without a command")


COMMANDS = (
    inspect, analyze, compare, combine, truncate, merge, export, verify, plan, advise,
    sweep, plot, report, doctor,
)  # fmt: skip
for command in COMMANDS:
    app.command()(command)
