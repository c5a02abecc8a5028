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
from peft import AdaLoraConfig, get_peft_model
from timing import console, milliseconds, paired, table
from transformers import BertConfig, BertModel

import rankwise as rw

SIZES = {
    "MiniLM-L6": BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536),
    "BERT-base": BertConfig(),
}
RANK, TARGET, STEPS = 12, 4, 10**6
# phase -> (step that is timed, warmup_steps, final_steps)
PHASES = {
    "warm-up": (2, 10, 10),
    "budgeting": (STEPS // 2, 0, 10),
    "final": (STEPS - 5, 0, 10),
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
    step, warmup, final = PHASES[phase]
    base = BertModel(config, add_pooling_layer=False)
    peft_config = AdaLoraConfig(
        init_r=RANK, target_r=TARGET, tinit=warmup, tfinal=final, deltaT=1, total_step=STEPS,
        target_modules=targets(base),
    )  # fmt: skip
    model = get_peft_model(base, peft_config)
    set_gradients(model, 0)
    if phase == "final":
        model.base_model.update_and_allocate(1)
        model.base_model.update_and_allocate(STEPS - final)
    return lambda: model.base_model.update_and_allocate(step)


def our_pass(config: BertConfig, phase: str):
    _, warmup, final = PHASES[phase]
    base = BertModel(config, add_pooling_layer=False)
    options = rw.AdaLoRAConfig(
        initial_rank=RANK, target_rank=TARGET, total_steps=STEPS,
        warmup_steps=STEPS - final - 1 if phase == "warm-up" else 0, final_steps=final,
        target_modules=targets(base),
    )  # fmt: skip
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
