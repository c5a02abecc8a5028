# The AdaLoRA allocator against PEFT's update_and_allocate, on the same adapters; and the spectral
# allocator's passes, which have no counterpart.
"""Prints medians and quartiles of milliseconds, and the median of the ratios of paired runs.

Each phase of the schedule is timed by itself: warm-up (averages only), budgeting (averages and an
allocation in each step), final (PEFT masks in each step; ours has shrunk). "warm" is the median of
ten passes in a row, "cold" one pass after 240 MB of other memory were written, as a training step
leaves the caches. Contenders alternate in one process, in random order; "twice" times rankwise
against itself, the noise of the method. "Llama-2-7B" has that model's 224 matrices as bases without
memory of their own, since no pass reads a base. A spectral event moves a rank out of each second
adapter into the others. On a GPU a time is that of ten passes between two
events, warm alone.
"""

from __future__ import annotations

from argparse import Namespace
from functools import cache
from statistics import median

import torch
from peft import get_peft_model
from transformers import BertConfig, BertModel

import rankwise as rw

from .adalora_phases import PHASES, RANK, enter_final, our_config, peft_config
from .measurement import Measurement, device_option, names
from .timing import as_json, console, milliseconds, paired, table
from .timing_cuda import device_milliseconds

BERTS = {
    "MiniLM-L6": BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536),
    "BERT-base": BertConfig(),
}
LLAMA = "Llama-2-7B"
LLAMA_LAYER = [(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)]  # in, out; of 32


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


def spectral_pass(name: str, device: str, event: bool):
    def to_and_fro(question: rw.RankQuestion) -> list[int]:
        return [RANK - (question.step + m) % 2 for m in range(len(question.ranks))]

    base = base_model(name, device)
    config = rw.SpectralConfig(
        initial_rank=RANK, total_steps=10**9, allocation_interval=1 if event else 10**8,
        rule=to_and_fro, target_modules=targets(base),
    )  # fmt: skip
    model = rw.apply_lora(base, config)
    set_gradients(model, 0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    optimizer.step()
    allocator = rw.SpectralAllocator(model, config)
    return lambda: allocator.step(optimizer)


def spectral(name: str, options: Namespace) -> tuple[str, dict]:
    contenders = {
        "between events": spectral_pass(name, options.device, event=False),
        "an event": spectral_pass(name, options.device, event=True),
        "an event, twice": spectral_pass(name, options.device, event=True),
    }
    timings = paired(contenders, options.repeats, milliseconds)
    title = f"{name}, rank {RANK}, SpectralAllocator"
    console.print(table(title, timings, "between events"))
    return title, as_json(timings)


def warm(action) -> float:
    return median(milliseconds(action) for _ in range(10))


def on_device(action) -> float:
    return device_milliseconds(action, calls=10)


@cache
def other_memory() -> torch.Tensor:
    return torch.zeros(60_000_000)


def cold(action) -> float:
    other_memory().add_(1.0)
    return milliseconds(action)


def run(options: Namespace) -> dict[str, dict]:
    found = {}
    for name in options.models:
        for phase in PHASES:
            makers = {"PEFT": peft_pass, "rankwise": our_pass, "rankwise, twice": our_pass}
            contenders = {who: make(name, phase, options.device) for who, make in makers.items()}
            for how in (warm, cold) if options.device == "cpu" else (on_device,):
                timings = paired(contenders, options.repeats, how)
                title = f"{name}, rank {RANK}, {phase}, {how.__name__}"
                found[title] = as_json(timings)
                console.print(table(title, timings, "PEFT"))
        title, timings = spectral(name, options)
        found[title] = timings
    return found


MEASUREMENT = Measurement(
    run,
    repeats=50,
    quick={"repeats": 5, "models": ["MiniLM-L6"]},
    arguments={
        "--models": names([*BERTS, LLAMA], list(BERTS), "whose linear layers have adapters"),
        "--device": device_option(),
    },
)
