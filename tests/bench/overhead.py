# What the Python of a layer costs beside its operator.
"""Times calls of one small layer in which the operator is an empty function.

What is left is the module's call and what the layer looks at before it takes the operator: of
rankwise's layers, and of PEFT's with our operators. Without the operator's own time, whose noise
is more than all of that.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from unittest.mock import patch

import peft
import torch
from rich.table import Table
from torch import nn

import rankwise as rw
from rankwise.integrations.peft import accelerate

from .measurement import Measurement, number
from .timing import as_json, console, milliseconds, paired

TOKENS, WIDTH, RANK = 8, 384, 8
WANTED = 6.0  # microseconds of PEFT's layers with our operators


class Empty(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def ours(config: rw.LoRAConfig) -> nn.Module:
    return rw.apply_lora(nn.Sequential(nn.Linear(WIDTH, WIDTH)), config)[0]


def accelerated(config: peft.LoraConfig) -> nn.Module:
    model = peft.get_peft_model(nn.Sequential(nn.Linear(WIDTH, WIDTH)), config)
    accelerate(model)
    return model.base_model.model[0]


def layers() -> dict[str, nn.Module]:
    lora = peft.LoraConfig(r=RANK, target_modules=["0"])
    adalora = peft.AdaLoraConfig(init_r=RANK, target_modules=["0"], total_step=10)
    return {
        "an empty module": Empty(),
        "LoRALinear": ours(rw.LoRAConfig(target_modules=["0"])),
        "AdaLoRALinear": ours(rw.AdaLoRAConfig(target_modules=["0"], total_steps=10)),
        "PEFT's LoRA layer, accelerated": accelerated(lora),
        "PEFT's AdaLoRA layer, accelerated": accelerated(adalora),
    }


def run(options: Namespace) -> object:
    x = torch.randn(1, TOKENS, WIDTH)
    calls = range(options.calls)

    def called(layer: nn.Module) -> Callable[[], None]:
        def action() -> None:
            for _ in calls:
                layer(x)

        return action

    contenders = {name: called(layer) for name, layer in layers().items()}
    with patch.object(rw.ops, "lora_linear", lambda *args, **kwargs: x):
        rows = paired(contenders, options.repeats, lambda f: 1e3 * milliseconds(f) / len(calls))
    shown = Table("layer", "median us", "quartiles", title="Python of a call beside its operator")
    for name, row in rows.items():
        shown.add_row(name, f"{row.median:.2f}", f"{row.low:.2f} .. {row.high:.2f}")
    console.print(shown, f"PEFT's layers with our operators: at most {WANTED:g} us wanted")
    return as_json(rows)


MEASUREMENT = Measurement(
    run,
    repeats=300,
    quick={"repeats": 30},
    threads=1,
    arguments={"--calls": number(100, "calls of a turn")},
)
