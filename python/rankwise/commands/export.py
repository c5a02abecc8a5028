"""`rankwise export`: an adapter's folder as a plain LoRA folder."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..analysis import updates
from ..file_export import export_folder
from .output import AsJson, Output, answer


class DType(str, Enum):
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def export(
    folder: Annotated[Path, typer.Argument(help="A PEFT folder, of LoRA or AdaLoRA.")],
    output: Output,
    dtype: Annotated[
        DType | None, typer.Option(help="Of all tensors. Otherwise they keep their own.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write an adapter as a plain LoRA that every program reads.

    One rank, scale 1, no patterns: lora_E and the scaling go into lora_B, rounded once, and lower
    ranks are filled with zeros. lora_A keeps its values. Modules trained whole are carried over.
    (combine makes new factors, by an SVD, of the lowest rank that the sum has.)
    """
    whole = export_folder(folder, output, None if dtype is None else getattr(torch, dtype))
    written = updates(output)
    report = {
        "written": str(output),
        "rank": max(update.rank for update in written.values()),
        "module_count": len(written),
        "dtypes": sorted({str(u.lora_B.dtype).removeprefix("torch.") for u in written.values()}),
        "trained_whole": whole,
    }
    answer(report, as_json)
