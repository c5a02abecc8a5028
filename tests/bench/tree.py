# How applying, saving and loading an adapter grow with the layers of a model, against PEFT.
"""Times each call once a turn on a new model: linear layers in blocks of four, as transformers have
them, and small, so that names and walks over the modules count and arithmetic does not.

"ranks differ" has other ranks from layer to layer, and so one pattern for each of them in
configurations and folders. The last column is what a layer costs: where it is the same for all
numbers of layers, the call is linear.
"""

from __future__ import annotations

import random
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import peft
from rich.table import Table
from torch import nn

import rankwise as rw

from .measurement import Measurement, number
from .timing import as_json, console, milliseconds, timings

WIDTH, RANK = 8, 2
SIZES = (1, 4, 10)  # times the fewest layers


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))


def base_model(layers: int) -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList(Block() for _ in range(layers // 4))
    return model


def ours(layers: int, folder: Path, **options) -> dict[str, float]:
    config = rw.LoRAConfig(rank=RANK, target_modules="all-linear", **options)
    model, other = base_model(layers), base_model(layers)
    return {
        "apply": milliseconds(lambda: rw.apply_lora(model, config)),
        "save": milliseconds(lambda: rw.save_adapter(model, folder)),
        "load": milliseconds(lambda: rw.load_adapter(other, folder)),
    }


def ours_of_many_ranks(layers: int, folder: Path) -> dict[str, float]:
    names = (n for n, m in base_model(layers).named_modules() if isinstance(m, nn.Linear))
    return ours(layers, folder, rank_pattern={name: 1 + i % 8 for i, name in enumerate(names)})


def stock(layers: int, folder: Path) -> dict[str, float]:
    config = peft.LoraConfig(r=RANK, target_modules=["query", "key", "value", "out"])
    model, other, adapted = base_model(layers), base_model(layers), []
    return {
        "apply": milliseconds(lambda: adapted.append(peft.get_peft_model(model, config))),
        "save": milliseconds(lambda: adapted[0].save_pretrained(folder)),
        "load": milliseconds(lambda: peft.PeftModel.from_pretrained(other, folder)),
    }


CONTENDERS: dict[str, Callable[[int, Path], dict[str, float]]] = {
    "PEFT": stock,
    "rankwise": ours,
    "rankwise, ranks differ": ours_of_many_ranks,
}


def run(options: Namespace) -> dict[str, dict]:
    found = {}
    for layers in (size * options.layers // 10 for size in SIZES):
        samples = sampled(layers, options.repeats)
        for call, of_call in samples.items():
            found[f"{call}, {layers} layers"] = as_json(timings(of_call, "PEFT"))
    console.print(growth(found))
    return found


def sampled(layers: int, repeats: int) -> dict[str, dict[str, list[float]]]:
    """{call: {contender: milliseconds, turn by turn}}."""
    samples = {call: {name: [] for name in CONTENDERS} for call in ("apply", "save", "load")}
    for _ in range(repeats):
        for name in random.sample(list(CONTENDERS), len(CONTENDERS)):
            with TemporaryDirectory() as folder:
                times = CONTENDERS[name](layers, Path(folder))
            for call, time in times.items():
                samples[call][name].append(time)
    return samples


def growth(found: dict[str, dict]) -> Table:
    result = Table(title="Adapting many layers", title_justify="left")
    result.add_column("call")
    for column in ("contender", "median s", "time over PEFT", "µs a layer"):
        result.add_column(column, justify="right")
    for call, rows in found.items():
        layers = int(call.split()[1])
        for name, t in rows.items():
            cost = f"{1e3 * t['median'] / layers:.0f}"
            result.add_row(call, name, f"{t['median'] / 1e3:.2f}", f"{t['ratio']:.2f}", cost)
    return result


MEASUREMENT = Measurement(
    run,
    repeats=3,
    quick={"repeats": 2, "layers": 1000},
    arguments={"--layers": number(10_000, "the most layers; also a tenth and four tenths", 40)},
)
