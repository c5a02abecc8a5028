# Three layers of one input: called one by one, and as a LoRALinearGroup.
"""Times forward and backward of q, k and v over one input, one by one and as a group."""

from __future__ import annotations

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
    layers = [rw.nn.LoRALinear(width, width, rank=rank, dtype=dtype) for _ in range(3)]
    for layer in layers:
        nn.init.normal_(layer.lora_B, std=0.02)
    x = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    dy = [torch.randn(tokens, width, dtype=dtype) for _ in layers]
    inputs = [x, *(p for layer in layers for p in (layer.lora_A, layer.lora_B))]
    group = rw.nn.LoRALinearGroup(layers)

    def both(call: Callable[[], list[Tensor]]) -> Callable[[], None]:
        return lambda: torch.autograd.grad(call(), inputs, dy)

    return {
        "one by one": both(lambda: [layer(x) for layer in layers]),
        "as a group": both(lambda: group(x)),
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
