# How the cost of LoRA grows: with rank, tokens and width of a layer, and with the layers of a step.
"""Times one size after the other, all else fixed; writes a table and a picture of each, and JSON.

Rank, tokens and width: forward and backward of one layer. Modules: whole training steps of stacked
layers, in float32 without dropout, with AdaLoRA in its budgeting phase.
"""

from __future__ import annotations

from argparse import Namespace

import torch
from rich.table import Table

from .contenders import CONTENDERS, Case, Tensors, check
from .growth_figure import draw
from .layers_goals import flop_floor
from .measurement import Measurement, number
from .step_contenders import adalora_steps, frozen, lora_steps
from .step_tasks import stack
from .timing import as_json, console, paired

NAMES = ("frozen", "PEFT", "rankwise")
TOKENS, WIDTH, RANK = 512, 768, 16
SWEEPS = {
    "rank": [(TOKENS, WIDTH, WIDTH, r) for r in (1, 4, 8, 16, 32, 64)],
    "tokens": [(m, WIDTH, WIDTH, RANK) for m in (1, 4, 16, 64, 256, 1024, 4096)],
    "width": [(TOKENS, k, k, RANK) for k in (128, 256, 384, 768, 1536, 3072)],
}
MODULES = (1, 2, 4, 8, 16, 32)
STACK = (128, 384)  # tokens, width


def run(options: Namespace) -> dict[str, list[dict]]:
    report: dict[str, list[dict]] = {}
    for sweep, shapes in SWEEPS.items():
        of = {"rank": "rank", "tokens": "tokens", "width": "n_in"}[sweep]
        cases = [
            Case(*shape, dtype=options.dtype, dropout=options.dropout)
            for shape in shapes[:: options.every]
        ]
        report[sweep] = [{"size": getattr(c, of), **layer(c, options.repeats)} for c in cases]
        console.print(growth_table(sweep, report[sweep]))
    report["modules"] = [
        {"size": n, "times": steps(n, options.repeats)} for n in MODULES[:: options.every]
    ]
    console.print(growth_table("modules", report["modules"]))
    fixed = {
        "rank": f"{TOKENS} tokens, {WIDTH} → {WIDTH}",
        "tokens": f"{WIDTH} → {WIDTH}, r {RANK}",
        "width": f"{TOKENS} tokens, r {RANK}",
        "modules": "steps of {} tokens, {} wide, float32".format(*STACK),
    }
    picture = options.output / "growth.png"
    draw(report, fixed, f"{options.dtype}, dropout {options.dropout:g}", picture)
    console.print(picture, soft_wrap=True)
    return report


def layer(case: Case, repeats: int) -> dict:
    check(case)
    t = Tensors.draw(case)
    layers = {name: CONTENDERS[name](case, t) for name in NAMES}

    def both(name: str) -> None:
        torch.autograd.grad(layers[name].forward(), layers[name].inputs, t.dy)

    times = paired({n: lambda n=n: both(n) for n in NAMES}, repeats)
    return {"times": as_json(times), "floor": flop_floor(case)}


def steps(modules: int, repeats: int) -> dict:
    task = stack(modules, *STACK)
    contenders = {"frozen": frozen(task)}
    contenders["PEFT"], _, contenders["rankwise"] = lora_steps(task)
    theirs, _, ours = adalora_steps(task, "budgeting")
    contenders["PEFT AdaLoRA"], contenders["rankwise AdaLoRA"] = theirs, ours
    return as_json(paired(contenders, repeats))


def growth_table(sweep: str, rows: list[dict]) -> Table:
    result = Table(title=f"Growth with {sweep}: median ms, and over frozen", title_justify="left")
    result.add_column(sweep, justify="right")
    for name in rows[0]["times"]:
        result.add_column(name, justify="right")
    result.add_column("FLOP floor", justify="right")
    for row in rows:
        cells = [f"{t['median']:.3f} ({t['ratio']:.2f})" for t in row["times"].values()]
        floor = f"{row['floor']:.2f}" if "floor" in row else ""
        result.add_row(str(row["size"]), *cells, floor)
    return result


MEASUREMENT = Measurement(
    run,
    repeats=30,
    quick={"repeats": 5, "every": 2},
    arguments={
        "--dtype": dict(
            choices=("float32", "bfloat16"),
            default="float32",
            help="of base and adapters (default %(default)s)",
        ),
        "--dropout": dict(
            type=float,
            default=0.0,
            metavar="P",
            help="of the adapter's input (default %(default)s)",
        ),
        "--every": number(1, "only each N-th size"),
    },
)
