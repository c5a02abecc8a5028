"""How commands answer: in tables or JSON, and errors in one line."""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from ..files import FileError

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")]
console = Console(highlight=False, markup=False, soft_wrap=True)


class Commands(TyperGroup):
    """What is wrong with files and values is a message, and the exit code 1."""

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (FileError, OSError, TypeError, ValueError) as error:
            print(f"rankwise: {error}", file=sys.stderr)
            raise typer.Exit(1) from None


def answer(found: Mapping[str, Any], as_json: bool, *tables: Table | str) -> None:
    """Prints a mapping: as JSON whole, else its single values, then the tables."""
    if as_json:
        print(json.dumps(_plain(found), indent=2, allow_nan=False))
        return
    single = {k: v for k, v in found.items() if not isinstance(v, (Mapping, list))}
    width = max(map(len, single), default=0)
    for key, value in single.items():
        if value is not None:
            console.print(f"{key.replace('_', ' '):{width}}  {_text(value)}")
    for table in tables:
        console.print(table)


def table(*columns: str, title: str | None = None) -> Table:
    """Its first column holds names, the others numbers."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for place, column in enumerate(columns):
        made.add_column(column, justify="left" if place == 0 else "right")
    return made


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    """JSON has no infinity and no NaN: they are words."""
    if isinstance(value, Mapping):
        return {str(key): _plain(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(own) for own in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
