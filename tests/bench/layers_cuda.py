# One linear layer with LoRA on a GPU: all contenders against the frozen layer.
"""Times forward, the whole step, and the step replayed from a graph; writes JSON and a table.

A case is timed only after its results were found at least as exact as PEFT's (contenders.check);
one that is not is named, and the program fails once the others are measured.
The first shapes come first in each rank, and a case for which no time is left is named. Compiled
PEFT, whose compilation takes longer than all else of a case, is timed at rank 16 of those alone,
all in bfloat16.
"""

from __future__ import annotations

import time
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from .contenders import Case, Layer, Tensors, check
from .contenders_cuda import CUDA_CONTENDERS, suited
from .layers_goals import overview
from .measurement import Measurement, kept, number, reason, within
from .memory import saved_bytes
from .timing import as_json, console, paired
from .timing_cuda import (
    CALLS,
    Graph,
    device_milliseconds,
    host_microseconds,
    peak_bytes,
    rotating,
)

SHAPES = [  # tokens, in, out
    (8192, 4096, 4096),
    (2048, 4096, 4096),
    (8192, 1024, 1024),
    (8192, 1024, 4096),
    (8192, 4096, 1024),
    (16384, 4096, 4096),
    (8192, 4096, 14336),
    (8192, 14336, 4096),
    (8192, 8192, 8192),
    (8192, 8192, 28672),
]
TINY = (16, 64, 64)  # the host's time alone
CACHE = 3 * 60 * 2**20  # bytes: x and dy of all turns exceed three times the largest L2 cache
WARM_UP = 2.0  # seconds, until clocks have settled
RANKS = (16, 8, 64)
FIRST = 3  # shapes
SAMPLE = 5.0  # milliseconds between two events, for which up to CALLS calls follow each other


def cases(shapes: int, ranks: int) -> list[Case]:
    return [
        Case(*shape, rank, dtype, dropout)
        for rank in RANKS[:ranks]
        for shape in SHAPES[:shapes]
        for dtype in ("bfloat16", "bfloat16_float32")
        for dropout in (0.0, 0.1)
    ]


def compiles(case: Case) -> bool:
    first = (case.tokens, case.n_in, case.n_out) in SHAPES[:FIRST]
    return first and case.rank == RANKS[0] and case.dtype == "bfloat16"


def run(options: Namespace) -> dict[str, object]:
    results, unfinished, failed = [], [], {}
    begun = within(options.limit, cases(options.shapes, options.ranks), unfinished)
    warm_up()
    for case in begun:
        with kept(failed, case):
            check(case, "cuda")
            compiled = options.compiled and compiles(case)
            names = [n for n in suited(case) if "compiled" not in n or compiled]
            results.append(measure(case, names, options.repeats))
            for name, why in results[-1]["left out"].items():
                console.print(f"{case}: {name} left out: {why}")
    console.print(overview(results, CUDA_CONTENDERS))
    report = {"cases": results, "host": {}, "unfinished": unfinished, "failed": failed}
    with kept(failed, "host"):
        report["host"] = host_times()
    console.print("host microseconds, forward and backward:", report["host"])
    return report


def warm_up() -> None:
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    end = time.monotonic() + WARM_UP
    while time.monotonic() < end:
        a @ a
        torch.cuda.synchronize()


def turns(case: Case) -> list[Tensors]:
    """Tensors that share parameters, in as many copies of x and dy as the cache demands."""
    first = Tensors.draw(case, "cuda")
    bytes_each = first.x.nbytes + first.dy.nbytes
    found = [first]
    while len(found) * bytes_each < CACHE or len(found) < 2:
        x = torch.randn_like(first.x).detach().requires_grad_()
        found.append(replace(first, x=x, dy=torch.randn_like(first.dy)))
    return found


def measure(case: Case, names: list[str], repeats: int) -> dict:
    torch._dynamo.reset()  # compiled layers of the last case count against dynamo's limit
    drawn = turns(case)
    left_out: dict[str, str] = {}

    def attempt(name: str, make: Callable[[], object]) -> object:
        """make(), or None with the reason kept: one contender must not end the measurement."""
        try:
            return make()
        except Exception as error:  # noqa: BLE001
            left_out[name] = reason(error)
            if name in ("frozen", "rankwise"):
                raise
            return None

    def layers(name: str) -> list[Layer]:
        made = [CUDA_CONTENDERS[name](case, t) for t in drawn]
        for layer, t in zip(made, drawn, strict=True):
            both(layer, t)
        return made

    def both(layer: Layer, t: Tensors) -> None:
        torch.autograd.grad(layer.forward(), layer.inputs, t.dy)

    found = {name: attempt(name, partial(layers, name)) for name in names}
    found = {name: made for name, made in found.items() if made}
    forward = {n: rotating([x.forward for x in made]) for n, made in found.items()}
    steps = {
        n: [partial(both, x, t) for x, t in zip(made, drawn, strict=True)]
        for n, made in found.items()
    }
    eager = {n: rotating(s) for n, s in steps.items()}
    calls = calls_between_events(eager["frozen"])
    how = partial(device_milliseconds, calls=calls)
    result: dict = {"case": vars(case), "left out": left_out, "calls": calls}
    result["forward"] = as_json(paired(forward, repeats, how))
    result["both"] = as_json(paired(eager, repeats, how))
    graphs = {n: attempt(f"{n}, graph", partial(Graph, s)) for n, s in steps.items()}
    graphs = {n: graph for n, graph in graphs.items() if graph}
    result["graph"] = as_json(paired(graphs, repeats, partial(Graph.milliseconds, calls=calls)))
    known = {x.untyped_storage().data_ptr() for t in drawn for x in vars(t).values()}
    result["saved bytes"] = {n: saved_bytes(made[0].forward, known) for n, made in found.items()}
    result["peak bytes"] = {n: peak_bytes(s[0]) for n, s in steps.items()}
    return result


def calls_between_events(action: Callable[[], object]) -> int:
    return max(2, min(CALLS, round(SAMPLE / device_milliseconds(action, calls=2))))


def host_times() -> dict[str, float]:
    """Microseconds of the calling thread for forward and backward of a layer."""
    case = Case(*TINY, 8, "bfloat16")
    t = Tensors.draw(case, "cuda")
    found = {}
    for name in (n for n in suited(case) if "compiled" not in n):
        try:
            layer = CUDA_CONTENDERS[name](case, t)
        except ImportError as error:
            console.print(f"host time of {name} left out: {error}")
            continue
        found[name] = host_microseconds(
            lambda layer=layer: torch.autograd.grad(layer.forward(), layer.inputs, t.dy)
        )
    return found


MEASUREMENT = Measurement(
    run,
    repeats=15,
    quick={"repeats": 5, "shapes": FIRST, "ranks": 1, "compiled": False},
    threads=None,
    arguments={
        "--shapes": number(len(SHAPES), "the first N shapes alone"),
        "--ranks": number(len(RANKS), f"the first N ranks of {RANKS} alone"),
        "--compiled": dict(action=BooleanOptionalAction, default=True, help="time compiled PEFT"),
        "--limit": number(3000, "seconds after which no case begins"),
    },
)
