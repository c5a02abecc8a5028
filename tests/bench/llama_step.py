# A whole training step of a Llama-shaped model: frozen, by PEFT and by rankwise.
"""Times forward, backward, AdamW and AdaLoRA's allocation, and measures the peak of memory.

The model has random weights in bfloat16 and adapters on all seven linear layers of a block. PEFT's
factors are float32 by default, which wants autocast; both have bfloat16 on request. AdaLoRA
allocates in every step. Contenders share the base's parameters and take turns in random order;
they are timed after their gradients without dropout were found to be PEFT's.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import asdict

from rich.table import Table

from .llama_contenders import ADALORA, LORA, SIZES, Step, Task, check, frozen
from .measurement import Measurement, device_option, kept, names, number, reason, within
from .memory import peak_bytes as peak_bytes_of_cpu
from .timing import Timing, as_json, console, milliseconds, paired
from .timing_cuda import device_milliseconds
from .timing_cuda import peak_bytes as peak_bytes_of_cuda

DROPOUT = 0.05
Makers = Mapping[str, Callable[[Task, float], Step]]
PARTS: dict[str, tuple[Makers, float]] = {  # how, dropout
    "LoRA": (LORA, 0.0),
    f"LoRA, dropout {DROPOUT}": (LORA, DROPOUT),
    "AdaLoRA": (ADALORA, 0.0),
}


def one_step(action: Callable[[], object]) -> float:
    return device_milliseconds(action, calls=1)


def measure(task: Task, makers: Makers, dropout: float, repeats: int) -> dict:
    left_out: dict[str, str] = {}
    steps: dict[str, Step] = {}
    for name, make in makers.items():
        try:  # a contender that fails must not end the measurement
            steps[name] = make(task, dropout)
            if dropout == 0:
                check({n: steps[n] for n in (next(iter(steps)), name)})
        except Exception as error:  # noqa: BLE001
            left_out[name] = reason(error)
            steps.pop(name, None)
            if name.startswith("rankwise"):
                raise
    actions: dict[str, Callable[[], object]] = {"frozen": frozen(task), **steps}
    on_cpu = task.device == "cpu"
    rows = paired(actions, repeats, milliseconds if on_cpu else one_step)
    peak = peak_bytes_of_cpu if on_cpu else peak_bytes_of_cuda
    peaks = {name: peak(action) for name, action in actions.items()}
    return {"steps": as_json(rows), "peak bytes": peaks, "left out": left_out}


def table(title: str, found: dict) -> Table:
    result = Table(title=title, title_justify="left")
    result.add_column("contender")
    for column in ("median ms", "quartiles", "time over frozen", "peak MiB"):
        result.add_column(column, justify="right")
    for name, row in found["steps"].items():
        t = Timing(**row)
        result.add_row(
            name,
            f"{t.median:.2f}",
            f"{t.low:.2f} .. {t.high:.2f}",
            f"{t.ratio:.3f} ({t.ratio_low:.3f} .. {t.ratio_high:.3f})",
            f"{found['peak bytes'][name] / 2**20:.1f}",
        )
    return result


def run(options: Namespace) -> dict:
    unfinished: list[str] = []
    parts = within(options.limit, options.parts, unfinished)
    name = options.size or ("1b" if options.device == "cuda" else "tiny")
    size = SIZES[name]
    task = Task.of(size, options.device)
    report: dict = {"size": {"name": name} | asdict(size), "parts": {}}
    report |= {"unfinished": unfinished, "failed": {}}
    for title in parts:
        makers, dropout = PARTS[title]
        with kept(report["failed"], title):
            found = measure(task, makers, dropout, options.repeats)
            report["parts"][title] = found
            batch = f"{size.batch} x {size.length} tokens"
            console.print(table(f"{title}: one step of Llama {name}, {batch}", found))
            for contender, why in found["left out"].items():
                console.print(f"{contender} left out: {why}")
    return report


MEASUREMENT = Measurement(
    run,
    repeats=7,
    quick={"repeats": 3, "parts": list(PARTS)[:2]},
    arguments={
        "--size": dict(choices=SIZES, help="of the model (default tiny, on a GPU 1b)"),
        "--device": device_option(),
        "--parts": names(list(PARTS), list(PARTS), "what is trained"),
        "--limit": number(3000, "seconds after which no part begins"),
    },
)
