# Which kernels one layer runs on a GPU, and how long each takes.
"""Profiles forward and backward of a layer, frozen and with LoRA; on the CPU, PyTorch's operations.

A time is that of the device alone: no gaps, no host.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .contenders import CONTENDERS, Case, Tensors
from .measurement import Measurement, device_option, kept, number, within
from .timing import console
from .timing_cuda import rotating

CASES = {
    "cpu": [Case(64, 48, 32, 4, "bfloat16", 0.1)],
    "cuda": [
        Case(8192, 4096, 4096, 16, "bfloat16"),
        Case(8192, 4096, 4096, 16, "bfloat16", 0.1),
        Case(8192, 4096, 4096, 16, "bfloat16_float32", 0.1),
        Case(8192, 1024, 1024, 16, "bfloat16"),
        Case(8192, 4096, 4096, 64, "bfloat16"),
    ],
}
TURNS = 4  # copies of all tensors, which no cache holds
NAMESPACE = re.compile(r"(?:\w+|\(anonymous namespace\))::")


def short(name: str) -> str:
    """Without result and namespaces, and cut: what is left tells kernels apart."""
    return NAMESPACE.sub("", name.removeprefix("void "))[:60]


def of_device(events: Iterable, device: str, calls: int) -> list[dict]:
    """Kernels by their time in one of `calls`, the longest first; on the CPU, operations."""
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if device == "cuda" and event.device_type == DeviceType.CUDA:
            times[event.name].append(event.device_time_total)
        elif device == "cpu" and event.name.startswith(("aten::", "rankwise::")):
            times[event.name].append(event.self_cpu_time_total)
    rows = [
        {"kernel": name, "short": short(name)}
        | {"microseconds": sum(found) / calls, "count": len(found) / calls}
        for name, found in times.items()
    ]
    return sorted(rows, key=lambda row: -row["microseconds"])


def profiled(case: Case, contender: str, device: str, calls: int) -> list[dict]:
    drawn = [Tensors.draw(case, device, seed) for seed in range(TURNS)]
    layers = [CONTENDERS[contender](case, t) for t in drawn]

    def both(i: int) -> Callable[[], object]:
        return lambda: torch.autograd.grad(layers[i].forward(), layers[i].inputs, drawn[i].dy)

    action = rotating([both(i) for i in range(TURNS)])
    for _ in range(TURNS):
        action()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities) as taken:
        for _ in range(calls):
            action()
        if device == "cuda":
            torch.cuda.synchronize()
    return of_device(taken.events(), device, calls)


def table(title: str, rows: list[dict]) -> Table:
    total = sum(row["microseconds"] for row in rows)
    result = Table(title=f"{title}: {total:.1f} microseconds", title_justify="left")
    result.add_column("kernel", no_wrap=True)
    for column in ("microseconds", "calls"):
        result.add_column(column, justify="right")
    for row in rows:
        microseconds, count = f"{row['microseconds']:.1f}", f"{row['count']:.1f}"
        result.add_row(row["short"], microseconds, count)
    return result


def run(options: Namespace) -> dict:
    found, unfinished, failed = [], [], {}
    for case in within(options.limit, CASES[options.device], unfinished):
        for contender in ("frozen", "rankwise"):
            with kept(failed, f"{contender}: {case}"):
                rows = profiled(case, contender, options.device, options.repeats)
                console.print(table(f"{contender}: {case}", rows))
                found.append({"case": vars(case), "contender": contender, "kernels": rows})
    return {"cases": found, "unfinished": unfinished, "failed": failed}


MEASUREMENT = Measurement(
    run,
    repeats=6,
    quick={"repeats": 2},
    arguments={
        "--device": device_option("cuda"),
        "--limit": number(3000, "seconds after which no case begins"),
    },
)
