# One linear layer with LoRA: all contenders against the frozen layer, over shapes, ranks, dropout.
"""Times forward, backward and both; writes JSON, tables and a picture of the ratios.

    python tests/bench/layers.py [--quick] [--repeats 30] [--threads 2] [--output build/bench]

A case is timed only after its results were found at least as exact as PEFT's (contenders.check).
"frozen" is whatever PyTorch calls, "frozen, packed" oneDNN: the faster of both makes the floor.
Saved bytes are what autograd keeps besides x and parameters; peak bytes the most that forward and
backward allocate.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from contenders import CONTENDERS, SHAPES, WITHOUT_DROPOUT, Case, Tensors, check
from layers_figure import draw
from layers_goals import floor_table, overview, speed_table
from memory import peak_bytes, saved_bytes
from timing import (
    OUTPUT,
    Timing,
    as_json,
    console,
    paired,
    sampled,
    table,
    timings,
    write_json,
)
from torch._functorch import config as functorch_config
from tqdm import tqdm

import rankwise as rw

QUICK = ("frozen", "frozen, twice", "frozen, packed", "PEFT", "rankwise")


def main(
    repeats: Annotated[int, typer.Option(help="Turns of each contender.")] = 30,
    threads: Annotated[int, typer.Option(help="Of PyTorch.")] = 2,
    quick: Annotated[bool, typer.Option(help="Both alone, of frozen, PEFT, rankwise.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for JSON and picture.")] = OUTPUT,
) -> None:
    """Times one layer with LoRA against the frozen layer and the peers."""
    torch.set_num_threads(threads)
    random.seed(0)
    results = []
    for case in tqdm(cases(), unit=" cases", disable=None):
        check(case)
        unfit = WITHOUT_DROPOUT if case.dropout else ()
        names = [n for n in (QUICK if quick else CONTENDERS) if n not in unfit]
        results.append(measure(case, names, repeats, whole_alone=quick))
        rows = {name: Timing(**row) for name, row in results[-1]["both"].items()}
        console.print(table(f"{case}, forward and backward", rows, "frozen"))
    console.print(overview(results, CONTENDERS))
    console.print(floor_table(results))
    console.print(speed_table(results))
    write_json(output / "layers.json", results)
    draw(results, output / "layers.png")
    console.print(output / "layers.png", soft_wrap=True)


def cases() -> list[Case]:
    return [
        Case(*shape, dtype=dtype, dropout=dropout)
        for dtype in ("float32", "bfloat16")
        for dropout in (0.0, 0.05)
        for shape in SHAPES
    ]


def measure(case: Case, names: Sequence[str], repeats: int, whole_alone: bool = False) -> dict:
    """Times forward and backward together, and unless `whole_alone` each by itself and memory."""
    functorch_config.donated_buffer = False  # for a compiled backward on a kept graph
    torch.compiler.reset()  # of one function it compiles eight shapes, and runs others uncompiled
    t = Tensors.draw(case)
    layers = {name: CONTENDERS[name](case, t) for name in names}

    def backward(name: str, y: torch.Tensor, **options) -> None:
        torch.autograd.grad(y, layers[name].inputs, t.dy, **options)

    both = {n: lambda n=n: backward(n, layers[n].forward()) for n in names}
    samples = sampled(both, repeats)
    result: dict = {"case": vars(case), "path": rw.ops.path(t.x)}
    result["both"] = as_json(timings(samples, "frozen"))
    result["speed-up over PEFT"] = timings(samples, "rankwise", ["PEFT"])["PEFT"].ratio
    if whole_alone:
        return result
    outputs = {name: layer.forward() for name, layer in layers.items()}
    parts = {
        "forward": {n: layers[n].forward for n in names},
        "backward": {n: partial(backward, n, outputs[n], retain_graph=True) for n in names},
    }
    result |= {mode: as_json(paired(own, repeats)) for mode, own in parts.items()}
    known = {x.untyped_storage().data_ptr() for x in vars(t).values()}
    result["saved bytes"] = {n: saved_bytes(layers[n].forward, known) for n in names}
    result["peak bytes"] = {n: peak_bytes(both[n]) for n in names}
    return result


if __name__ == "__main__":
    typer.run(main)
