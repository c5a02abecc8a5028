# One linear layer with LoRA: all contenders against the frozen layer, over shapes, ranks, dropout.
"""Times forward, backward and both; writes JSON, tables and a picture of the ratios.

    python tests/bench/layers.py [--quick] [--repeats 30] [--threads 2] [--output build/bench]

A case is timed only after its results were found at least as exact as PEFT's (contenders.check).
Saved bytes are what autograd keeps besides x and parameters; peak bytes the most that forward and
backward allocate.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from contenders import CONTENDERS, SHAPES, WITHOUT_DROPOUT, Case, Tensors, check
from layers_figure import draw
from rich.table import Table
from timing import Timing, as_json, console, paired, table
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

OUTPUT = Path(__file__).resolve().parents[2] / "build" / "bench"


def main(
    repeats: Annotated[int, typer.Option(help="Turns of each contender.")] = 30,
    threads: Annotated[int, typer.Option(help="Of PyTorch.")] = 2,
    quick: Annotated[bool, typer.Option(help="Three small shapes, no compiled PEFT.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for JSON and picture.")] = OUTPUT,
) -> None:
    """Times one layer with LoRA against the frozen layer and the peers."""
    torch.set_num_threads(threads)
    random.seed(0)
    cases = [
        Case(*shape, dtype=dtype, dropout=dropout)
        for dtype in ("float32", "bfloat16")
        for dropout in (0.0, 0.05)
        for shape in (SHAPES[1:4] if quick else SHAPES)
    ]
    skipped = {"PEFT compiled"} if quick else set()
    results = []
    for case in tqdm(cases, unit=" cases", disable=None):
        check(case)
        unfit = WITHOUT_DROPOUT if case.dropout else ()
        names = [n for n in CONTENDERS if n not in skipped and n not in unfit]
        results.append(measure(case, names, repeats))
        timings = {name: Timing(**row) for name, row in results[-1]["both"].items()}
        console.print(table(f"{case}, forward and backward", timings, "frozen"))
    console.print(overview(results))
    output.mkdir(parents=True, exist_ok=True)
    (output / "layers.json").write_text(json.dumps(results, indent=1))
    draw(results, output / "layers.png")
    console.print(f"{output / 'layers.json'}\n{output / 'layers.png'}")


def measure(case: Case, names: list[str], repeats: int) -> dict:
    t = Tensors.draw(case)
    layers = {name: CONTENDERS[name](case, t) for name in names}
    outputs = {name: layer.forward() for name, layer in layers.items()}

    def backward(name: str, y: torch.Tensor, **options) -> None:
        torch.autograd.grad(y, layers[name].inputs, t.dy, **options)

    actions = {
        "forward": {n: layers[n].forward for n in names},
        "backward": {n: partial(backward, n, outputs[n], retain_graph=True) for n in names},
        "both": {n: lambda n=n: backward(n, layers[n].forward()) for n in names},
    }
    result: dict = {mode: as_json(paired(own, repeats)) for mode, own in actions.items()}
    known = {x.untyped_storage().data_ptr() for x in vars(t).values()}
    result["saved bytes"] = {n: saved_bytes(layers[n].forward, known) for n in names}
    result["peak bytes"] = {n: peak_bytes(actions["both"][n]) for n in names}
    return {"case": vars(case), **result}


def saved_bytes(forward, known: set[int]) -> int:
    """Bytes that autograd keeps for backward, besides x and parameters."""
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and not isinstance(tensor, torch.nn.Parameter):
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()  # until here, so that no storage is counted twice
    del kept
    return sum(storages.values())


def peak_bytes(action) -> int:
    """The most bytes that were allocated at a time, over what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        action()
    now = peak = 0
    for event in run.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def overview(results: list[dict], contenders: Iterable[str] = CONTENDERS) -> Table:
    """Ratios to frozen of forward and backward, a row for each case."""
    names = [n for n in contenders if n != "frozen" and any(n in r["both"] for r in results)]
    result = Table(title="Time over frozen, forward and backward", title_justify="left")
    for column in ("case", *names):
        result.add_column(column, justify="left" if column == "case" else "right")
    for row in results:
        cells = [f"{row['both'][n]['ratio']:.2f}" if n in row["both"] else "" for n in names]
        result.add_row(str(Case(**row["case"])), *cells)
    return result


if __name__ == "__main__":
    typer.run(main)
