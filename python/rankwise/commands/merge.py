"""`rankwise merge`: an adapter's folder into a model's folder."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..folder_changes import changes_of
from ..folder_merge import merge_folder
from ..merging import MergeReport
from ..model_folder import read_model_folder
from .output import AsJson, Output, answer, table

SWALLOWED = 0.1  # where less of a rounded weight changed, most of the update may be lost


def merge(
    model: Annotated[Path, typer.Argument(help="A model's folder, by transformers.")],
    adapter: Annotated[Path, typer.Argument(help="A PEFT folder, of LoRA or AdaLoRA.")],
    output: Output,
    as_json: AsJson = False,
) -> None:
    """Write a model folder with the adapter merged into its weights.

    Transformers loads it without PEFT. One tensor is in memory at a time. Sums are formed in
    float64 and rounded once to the tensor's dtype; the report says how far that moved weights. The
    new folder appears when it is whole.
    """
    from rich.console import Console
    from rich.progress import track

    folder = read_model_folder(model)
    changes = changes_of(folder, adapter)
    shown = Console(stderr=True)
    merging = merge_folder(folder, changes, output)
    reports = dict(
        track(merging, "merging", len(changes), console=shown, disable=not shown.is_terminal)
    )
    whole = MergeReport(
        max((r.max_rounding_error for r in reports.values()), default=0.0),
        sum(r.changed for r in reports.values()),
        sum(r.total for r in reports.values()),
    )
    found = {
        "written": str(output),
        **_numbers(whole),
        "warnings": [_swallowed(name, r) for name, r in reports.items() if _is_swallowed(r)],
        "left_out": [str(path) for path, needed in folder.others() if not needed],
        "modules": {name: _numbers(report) for name, report in reports.items()},
    }
    lines = table("module", "changed", "of", "rounding error")
    for name, own in found["modules"].items():
        share = f"{100 * own['share_changed']:.1f} %"
        lines.add_row(name, share, f"{own['total']:,}", f"{own['max_rounding_error']:.2g}")
    for warning in found["warnings"]:
        print(f"rankwise: {warning}", file=sys.stderr)
    answer(found, as_json, lines)


def _numbers(report: MergeReport) -> dict:
    return {**asdict(report), "share_changed": report.changed / max(report.total, 1)}


def _is_swallowed(report: MergeReport) -> bool:
    return report.max_rounding_error > 0 and report.changed < SWALLOWED * report.total


def _swallowed(name: str, report: MergeReport) -> str:
    share = 100 * report.changed / report.total
    return f"{name}: only {share:.1f} % of weights changed: rounding may have swallowed the update"
