# Three layers of one input: one by one, as a LoRALinearGroup, and one by one with share_inputs.
"""Times forward and backward of q, k and v over one input: one by one, as a group, and shared."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rankwise as rw

from .measurement import Measurement, device_option
from .timing import as_json, console, milliseconds, paired, table
from .timing_cuda import device_milliseconds

SHAPES = {  # tokens, width, rank
    "cpu": ((512, 384, 8), (2048, 1024, 16)),
    "cuda": ((8192, 4096, 16), (8192, 1024, 16)),
}
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}


def contenders(
    tokens: int, width: int, rank: int, dtype: torch.dtype, device: str = "cpu"
) -> dict[str, Callable]:
    with torch.device(device):
        attention = nn.ModuleDict(
            {n: rw.nn.LoRALinear(width, width, rank=rank, dtype=dtype) for n in ("q", "k", "v")}
        )
        x = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
        dy = [torch.randn(tokens, width, dtype=dtype) for _ in attention]
    layers = list(attention.values())
    for layer in layers:
        nn.init.normal_(layer.lora_B, std=0.02)
    shared = copy.deepcopy(attention)
    rw.share_inputs(shared)
    group = rw.nn.LoRALinearGroup(layers)

    def both(of: nn.Module | None, call: Callable[[], list[Tensor]]) -> Callable[[], None]:
        factors = (p for p in of.parameters() if p.requires_grad) if of else ()
        inputs = [x, *factors]
        return lambda: torch.autograd.grad(call(), inputs, dy)

    return {
        "one by one": both(attention, lambda: [layer(x) for layer in layers]),
        "as a group": both(attention, lambda: group(x)),
        "share_inputs": both(shared, lambda: [layer(x) for layer in shared.values()]),
        "frozen": both(None, lambda: [F.linear(x, y.weight, y.bias) for y in layers]),
    }


def run(options: Namespace) -> list[dict]:
    device, results = options.device, []
    how = milliseconds if device == "cpu" else device_milliseconds
    for tokens, width, rank in SHAPES[device]:
        for dtype in DTYPES[device]:
            made = contenders(tokens, width, rank, dtype, device)
            rows = paired(made, options.repeats, how)
            title = f"{tokens} x {width} x {width}, rank {rank}, {str(dtype).split('.')[-1]}"
            console.print(table(title, rows, "one by one"))
            results.append({"case": title, "rows": as_json(rows)})
    return results


MEASUREMENT = Measurement(
    run,
    repeats=100,
    quick={"repeats": 10},
    arguments={"--device": device_option()},
)
