"""`rankwise inspect`: what an adapter folder holds."""

import warnings
from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor

from .._library import library
from ..analysis.updates import tensors_of
from .output import AsJson, answer, table


def inspect(
    folder: Annotated[Path, typer.Argument(help="A PEFT folder, of LoRA or AdaLoRA.")],
    as_json: AsJson = False,
) -> None:
    """What an adapter folder holds.

    Its method, ranks, scales and sizes, and whether it is sound. Exits with 1 where a value is
    infinite or NaN.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that are not finite, which health tells
        file = library.read_adapter(folder)
    config = file.config
    modules = {update.module: _module(update) for update in library.updates_of(file)}
    other = [t for key, t in file.tensors.items() if "lora_" not in key]
    ranks = [module["rank"] for module in modules.values()]
    unsound = [name for name, module in modules.items() if module["health"] == "not finite"]
    report = {
        "method": config.peft_type,
        "base_model": config.base_model_name_or_path or None,
        "rank": config.rank,
        "alpha": config.alpha,
        "rslora": config.rslora,
        "dropout": config.dropout,
        "ranks": {"least": min(ranks, default=0), "most": max(ranks, default=0)},
        "module_count": len(modules),
        "parameters": sum(module["parameters"] for module in modules.values()),
        "trained_whole": sum(tensor.numel() for tensor in other),
        "bytes": sum(t.numel() * t.element_size() for t in file.tensors.values()),
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in file.tensors.values()}),
        "health": f"not finite: {', '.join(unsound)}" if unsound else "ok",
        "modules": modules,
    }
    shown = table("module", "out x in", "rank", "scaling", "parameters", "health")
    for name, module in modules.items():
        shape = f"{module['out_features']} x {module['in_features']}"
        shown.add_row(
            name, shape, str(module["rank"]), f"{module['scaling']:g}",
            f"{module['parameters']:,}", module["health"],
        )  # fmt: skip
    answer(report, as_json, shown)
    if unsound:
        raise typer.Exit(1)


def _module(update) -> dict:
    factors = tensors_of(update)
    return {
        "out_features": update.lora_B.shape[0],
        "in_features": update.lora_A.shape[1],
        "rank": update.lora_A.shape[0],
        "scaling": update.scaling,
        "parameters": sum(t.numel() for t in factors),
        "health": _health(factors),
    }


def _health(factors: list[Tensor]) -> str:
    if not all(bool(t.isfinite().all()) for t in factors):
        return "not finite"
    return "ok" if all(bool(t.any()) for t in factors) else "zero: adds nothing"
