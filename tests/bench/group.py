# Three layers of one input: one by one, as a LoRALinearGroup, and one by one with share_inputs.
"""Times forward and backward of q, k and v over one input: one by one, as a group, and shared."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Callable

import torch
from torch import Tensor, nn

import rankwise as rw

from .measurement import Measurement
from .timing import as_json, console, paired, table

SHAPES = ((512, 384, 8), (2048, 1024, 16))  # tokens, width, rank
DTYPES = (torch.float32, torch.bfloat16)


def contenders(tokens: int, width: int, rank: int, dtype: torch.dtype) -> dict[str, Callable]:
    attention = nn.ModuleDict(
        {name: rw.nn.LoRALinear(width, width, rank=rank, dtype=dtype) for name in ("q", "k", "v")}
    )
    layers = list(attention.values())
    for layer in layers:
        nn.init.normal_(layer.lora_B, std=0.02)
    shared = copy.deepcopy(attention)
    rw.share_inputs(shared)
    x = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    dy = [torch.randn(tokens, width, dtype=dtype) for _ in layers]
    group = rw.nn.LoRALinearGroup(layers)

    def both(of: nn.ModuleDict, call: Callable[[], list[Tensor]]) -> Callable[[], None]:
        inputs = [x, *(p for p in of.parameters() if p.requires_grad)]
        return lambda: torch.autograd.grad(call(), inputs, dy)

    return {
        "one by one": both(attention, lambda: [layer(x) for layer in layers]),
        "as a group": both(attention, lambda: group(x)),
        "share_inputs": both(shared, lambda: [layer(x) for layer in shared.values()]),
    }


def run(options: Namespace) -> list[dict]:
    results = []
    for tokens, width, rank in SHAPES:
        for dtype in DTYPES:
            rows = paired(contenders(tokens, width, rank, dtype), options.repeats)
            title = f"{tokens} x {width} x {width}, rank {rank}, {str(dtype).split('.')[-1]}"
            console.print(table(title, rows, "one by one"))
            results.append({"case": title, "rows": as_json(rows)})
    return results


MEASUREMENT = Measurement(run, repeats=100, quick={"repeats": 10})
