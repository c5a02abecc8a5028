# One linear layer with LoRA: all contenders against the frozen layer, over shapes, ranks, dropout.
"""Times forward, backward and both; writes JSON, tables and a picture of the ratios.

A case is timed only after its results were found at least as exact as PEFT's (contenders.check).
"frozen" is whatever PyTorch calls, "frozen, packed" oneDNN: the faster of both makes the floor.
Saved bytes are what autograd keeps besides x and parameters; peak bytes the most that forward and
backward allocate.
"""

from __future__ import annotations

from argparse import BooleanOptionalAction, Namespace
from collections.abc import Sequence
from functools import partial

import torch
from torch._functorch import config as functorch_config
from tqdm import tqdm

import rankwise as rw

from .contenders import CONTENDERS, SHAPES, WITHOUT_DROPOUT, Case, Tensors, check
from .layers_figure import draw
from .layers_goals import floor_table, overview, speed_table
from .measurement import Measurement, number
from .memory import peak_bytes, saved_bytes
from .timing import (
    Timing,
    as_json,
    console,
    paired,
    sampled,
    table,
    timings,
)

TOGETHER = ("frozen", "frozen, twice", "frozen, packed", "PEFT", "rankwise")


def run(options: Namespace) -> list[dict]:
    results = []
    names = TOGETHER if options.together else CONTENDERS
    for case in tqdm(cases(options.shapes), unit=" cases", disable=None):
        check(case)
        unfit = WITHOUT_DROPOUT if case.dropout else ()
        suited = [name for name in names if name not in unfit]
        results.append(measure(case, suited, options.repeats, options.together))
        rows = {name: Timing(**row) for name, row in results[-1]["both"].items()}
        console.print(table(f"{case}, forward and backward", rows, "frozen"))
    console.print(overview(results, CONTENDERS))
    console.print(floor_table(results))
    console.print(speed_table(results))
    draw(results, options.output / "layers.png")
    console.print(options.output / "layers.png", soft_wrap=True)
    return results


def cases(shapes: int) -> list[Case]:
    return [
        Case(*shape, dtype=dtype, dropout=dropout)
        for dtype in ("float32", "bfloat16")
        for dropout in (0.0, 0.05)
        for shape in SHAPES[:shapes]
    ]


def measure(case: Case, names: Sequence[str], repeats: int, together: bool) -> dict:
    """Times forward and backward, and unless they are wanted `together` alone, each and memory."""
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
    if together:
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


MEASUREMENT = Measurement(
    run,
    repeats=30,
    quick={"repeats": 5, "shapes": 4, "together": True},
    arguments={
        "--shapes": number(len(SHAPES), "the first N shapes alone"),
        "--together": dict(
            action=BooleanOptionalAction,
            default=False,
            help=f"forward and backward together alone, of {'; '.join(TOGETHER)}",
        ),
    },
)
