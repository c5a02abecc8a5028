# The AdaLoRA allocator against PEFT's update_and_allocate, on the same adapters.
"""Prints medians and quartiles of milliseconds, and the median of the ratios of paired runs.

    python tests/bench/allocator.py [--repeats 50] [--threads 2]

Each phase of the schedule is timed by itself: warm-up (averages only), budgeting (averages and an
allocation in each step), final (PEFT masks in each step; ours has shrunk). "warm" is the median of
ten passes in a row, "cold" one pass after 240 MB of other memory were written, as a training step
leaves the caches. Contenders alternate in one process, in random order; "twice" times rankwise
against itself, the noise of the method.
"""

from __future__ import annotations

import random
from statistics import median
from typing import Annotated

import torch
import typer
from adalora_phases import PHASES, RANK, enter_final, our_config, peft_config
from peft import get_peft_model
from timing import console, milliseconds, paired, table
from transformers import BertConfig, BertModel

import rankwise as rw

SIZES = {
    "MiniLM-L6": BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536),
    "BERT-base": BertConfig(),
}
OTHER_MEMORY = torch.zeros(60_000_000)


def targets(model: torch.nn.Module) -> list[str]:
    """Every linear layer of the encoder, 6 in each of its layers."""
    linear = torch.nn.Linear
    return [n for n, m in model.named_modules() if isinstance(m, linear) and "encoder" in n]


def set_gradients(model: torch.nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                parameter.normal_(std=0.02)
            parameter.grad = torch.randn_like(parameter)


def peft_pass(config: BertConfig, phase: str):
    step, *_ = PHASES[phase]
    base = BertModel(config, add_pooling_layer=False)
    model = get_peft_model(base, peft_config(phase, target_modules=targets(base)))
    set_gradients(model, 0)
    if phase == "final":
        enter_final(model)
    return lambda: model.base_model.update_and_allocate(step)


def our_pass(config: BertConfig, phase: str):
    base = BertModel(config, add_pooling_layer=False)
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


def cold(action) -> float:
    OTHER_MEMORY.add_(1.0)
    return milliseconds(action)


def main(
    repeats: Annotated[int, typer.Option(help="Turns of each contender.")] = 50,
    threads: Annotated[int, typer.Option(help="Of PyTorch.")] = 2,
) -> None:
    """Times the AdaLoRA allocator against PEFT's."""
    torch.set_num_threads(threads)
    random.seed(0)
    for size, config in SIZES.items():
        for phase in PHASES:
            contenders = {"PEFT": peft_pass(config, phase), "rankwise": our_pass(config, phase)}
            contenders["rankwise, twice"] = our_pass(config, phase)
            for how in (warm, cold):
                timings = paired(contenders, repeats, how)
                title = f"{size}, rank {RANK}, {phase}, {how.__name__}"
                console.print(table(title, timings, "PEFT"))


if __name__ == "__main__":
    typer.run(main)
