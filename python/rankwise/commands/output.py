"""How commands answer: in tables or JSON, and errors in one line."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..files import FileError

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")]


class Commands(TyperGroup):
    """What is wrong with files and values is a message, and the exit code 1."""

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (FileError, ModuleNotFoundError, OSError, TypeError, ValueError) as error:
            print(f"rankwise: {error}", file=sys.stderr)
            raise typer.Exit(1) from None


class Table:
    """Its first column holds names, the others numbers. str() gives its lines."""

    def __init__(self, columns: Sequence[str]):
        self.rows = [columns]

    def add_row(self, *cells: str) -> None:
        self.rows.append(cells)

    def __str__(self) -> str:
        first, *others = (max(map(len, column)) for column in zip(*self.rows, strict=True))
        form = "  ".join([f"{{:<{first}}}", *(f"{{:>{width}}}" for width in others)])
        return "\n".join(form.format(*row).rstrip() for row in self.rows)


def answer(found: Mapping[str, Any], as_json: bool, *tables: Table | str) -> None:
    """Prints a mapping: as JSON whole, else its single values, then the tables."""
    if as_json:
        print(json.dumps(_plain(found), indent=2, allow_nan=False))
        return
    single = {k: v for k, v in found.items() if not isinstance(v, (Mapping, list))}
    width = max(map(len, single), default=0)
    for key, value in single.items():
        if value is not None:
            print(f"{key.replace('_', ' '):{width}}  {_text(value)}")
    for table in tables:
        print(table)


def table(*columns: str) -> Table:
    return Table(columns)


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
