"""The command line, one module a command. Needs typer and rich, which the library does without."""

from typing import Annotated

import typer

from .doctor import doctor

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


app.command()(doctor)
