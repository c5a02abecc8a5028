# The AdaLoRA allocator against PEFT's update_and_allocate, on the same adapters.
"""Prints medians and quartiles of milliseconds, and the median of the ratios of paired runs.

    python tests/bench/allocator.py [--repeats 50] [--threads 2] [--models MiniLM-L6,BERT-base]
                                    [--device cpu] [--output FOLDER]

Each phase of the schedule is timed by itself: warm-up (averages only), budgeting (averages and an
allocation in each step), final (PEFT masks in each step; ours has shrunk). "warm" is the median of
ten passes in a row, "cold" one pass after 240 MB of other memory were written, as a training step
leaves the caches. Contenders alternate in one process, in random order; "twice" times rankwise
against itself, the noise of the method. "Llama-2-7B" has that model's 224 matrices as bases without
memory of their own, since no pass reads a base. On a GPU a time is that of ten passes between two
events, warm alone; --output writes JSON.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from adalora_phases import PHASES, RANK, enter_final, our_config, peft_config
from peft import get_peft_model
from timing import as_json, console, milliseconds, paired, table
from timing_cuda import device_milliseconds
from transformers import BertConfig, BertModel

import rankwise as rw

BERTS = {
    "MiniLM-L6": BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536),
    "BERT-base": BertConfig(),
}
LLAMA = "Llama-2-7B"
LLAMA_LAYER = [(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)]  # in, out; of 32
OTHER_MEMORY = torch.zeros(60_000_000)


def base_model(name: str, device: str) -> torch.nn.Module:
    if name != LLAMA:
        return BertModel(BERTS[name], add_pooling_layer=False).encoder.to(device)
    linears = torch.nn.Sequential()
    for n_in, n_out in 32 * LLAMA_LAYER:
        linear = torch.nn.Linear(1, 1, bias=False, device=device)
        weight = linear.weight.detach().expand(n_out, n_in)
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        linear.in_features, linear.out_features = n_in, n_out
        linears.append(linear)
    return linears


def targets(model: torch.nn.Module) -> list[str]:
    """Every linear layer, 6 in each of BERT's layers."""
    return [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]


def set_gradients(model: torch.nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                parameter.normal_(std=0.02)
            parameter.grad = torch.randn_like(parameter)


def peft_pass(name: str, phase: str, device: str):
    step, *_ = PHASES[phase]
    base = base_model(name, device)
    model = get_peft_model(base, peft_config(phase, target_modules=targets(base)))
    set_gradients(model, 0)
    if phase == "final":
        enter_final(model)
    return lambda: model.base_model.update_and_allocate(step)


def our_pass(name: str, phase: str, device: str):
    base = base_model(name, device)
    options = our_config(phase, target_modules=targets(base))
    model = rw.apply_lora(base, options)
    set_gradients(model, 0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    allocator = rw.RankAllocator(model, options)
    if phase == "final":
        allocator.step(optimizer)
        allocator.freeze(optimizer)
    return lambda: allocator.step(optimizer)


def warm(action) -> float:
    return median(milliseconds(action) for _ in range(10))


def on_device(action) -> float:
    return device_milliseconds(action, calls=10)


def cold(action) -> float:
    OTHER_MEMORY.add_(1.0)
    return milliseconds(action)


def main(
    repeats: Annotated[int, typer.Option(help="Turns of each contender.")] = 50,
    threads: Annotated[int, typer.Option(help="Of PyTorch.")] = 2,
    models: Annotated[str, typer.Option(help=f"{', '.join(BERTS)}, {LLAMA}")] = ",".join(BERTS),
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    output: Annotated[Path | None, typer.Option(help="Folder for allocator.json.")] = None,
) -> None:
    """Times the AdaLoRA allocator against PEFT's."""
    torch.set_num_threads(threads)
    random.seed(0)
    found = {}
    for name in models.split(","):
        for phase in PHASES:
            makers = {"PEFT": peft_pass, "rankwise": our_pass, "rankwise, twice": our_pass}
            contenders = {who: make(name, phase, device) for who, make in makers.items()}
            for how in (warm, cold) if device == "cpu" else (on_device,):
                timings = paired(contenders, repeats, how)
                title = f"{name}, rank {RANK}, {phase}, {how.__name__}"
                found[title] = as_json(timings)
                console.print(table(title, timings, "PEFT"))
    if output is not None:
        (output / "allocator.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    typer.run(main)
