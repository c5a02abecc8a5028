"""The methods that are compared, at equal parameters at the end, and one training by each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tasks import Task
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LinearLR

import rankwise as rw

PENALTY_WEIGHT = 0.1  # AdaLoRA's, "mean_norm", as in the paper's code
Allocator = rw.RankAllocator | rw.SpectralAllocator


@dataclass(frozen=True)
class Outcome:
    """Accuracies by split; the ranks of each layer at the end, and after each event."""

    accuracies: dict[str, float]
    loss: float  # mean of the last tenth of the steps
    ranks: dict[str, int]
    events: list[tuple[int, list[int]]]


def frozen(task: Task, model: nn.Module) -> tuple[nn.Module, None]:
    """The base, with what is trained whole."""
    model.requires_grad_(False)
    for name in task.whole:
        model.get_submodule(name).requires_grad_(True)
    return model, None


def _where(task: Task) -> dict:
    return {"target_modules": task.targets, "modules_to_save": task.whole}


def _schedule(task: Task) -> dict[str, int]:
    return {
        "total_steps": task.steps,
        "warmup_steps": task.steps // 10,
        "final_steps": task.steps // 3,
        "allocation_interval": max(task.steps // 40, 1),
    }


def lora(task: Task, model: nn.Module) -> tuple[nn.Module, None]:
    config = rw.LoRAConfig(rank=task.rank, alpha=2.0 * task.rank, **_where(task))
    return rw.apply_lora(model, config), None


def adalora(task: Task, model: nn.Module) -> tuple[nn.Module, Allocator]:
    """From three times the rank; the budget counts parameters."""
    config = rw.AdaLoRAConfig(
        initial_rank=3 * task.rank, target_rank=task.rank, alpha=6.0 * task.rank,
        budget_unit="parameters", **_schedule(task), **_where(task),
    )  # fmt: skip
    return rw.apply_lora(model, config), rw.RankAllocator(model, config)


def _spectral(task: Task, model: nn.Module, **options) -> tuple[nn.Module, Allocator]:
    config = rw.SpectralConfig(**options, **_schedule(task), **_where(task))
    rw.apply_lora(model, config)
    return model, rw.SpectralAllocator(model, config)


def pruned(task: Task, model: nn.Module) -> tuple[nn.Module, Allocator]:
    """Spectral, from twice the rank; no rank rises."""
    first = 2 * task.rank
    layers = rw.summary(lora(task, task.new_model(0))[0]).layers
    budget = sum(task.rank * (x.in_features + x.out_features) for x in layers)
    return _spectral(
        task, model, initial_rank=first, max_rank=first, alpha=2.0 * first, final_budget=budget,
        min_rank=0,
    )  # fmt: skip


def grown(task: Task, model: nn.Module, **options) -> tuple[nn.Module, Allocator]:
    """Spectral, at the rank from the start; ranks rise up to four times of it."""
    return _spectral(
        task, model, initial_rank=task.rank, max_rank=4 * task.rank, alpha=2.0 * task.rank,
        min_rank=0, **options,
    )  # fmt: skip


def grown_by_gradient(task: Task, model: nn.Module) -> tuple[nn.Module, Allocator]:
    """The same, towards the gradient that directions do not see, in adapters that miss most."""
    return grown(task, model, probes=3, growth="gradient")


Method = Callable[[Task, nn.Module], tuple[nn.Module, Allocator | None]]
METHODS: dict[str, Method] = {
    "frozen": frozen,
    "LoRA": lora,
    "AdaLoRA": adalora,
    "AdaLoRA, faster E": adalora,
    "spectral, pruned": pruned,
    "spectral, grown": grown,
    "spectral, by gradient": grown_by_gradient,
}
E_RATIOS = {"AdaLoRA, faster E": 8.0}  # of lora_E's rate to that of lora_A and lora_B


def run(task: Task, method: str, rate: float, seed: int) -> Outcome:
    """One training; everything random comes from the seed."""
    torch.manual_seed(seed)
    model, allocator = METHODS[method](task, task.new_model(seed))
    return train_and_measure(task, model, allocator, rate, seed, E_RATIOS.get(method, 1.0))


def train_and_measure(
    task: Task, model: nn.Module, allocator: Allocator | None, rate: float, seed: int,
    e_ratio: float = 1.0,
) -> Outcome:  # fmt: skip
    adapted = any(isinstance(module, rw.nn.LoRALinear) for module in model.modules())
    parameters = [p for p in model.parameters() if p.requires_grad]
    if adapted:
        parameters = rw.parameter_groups(model, rate, ratio=1.0, e_ratio=e_ratio)
    losses = _train(task, model.train(), allocator, AdamW(parameters, rate), seed)
    model.eval()
    accuracies = {split: task.accuracy(model, split) for split in ("validation", "test")}
    last = losses[-max(len(losses) // 10, 1) :]
    ranks = {x.name: x.rank for x in rw.summary(model).layers} if adapted else {}
    events = [(e.step, list(e.ranks)) for e in allocator.history] if allocator else []
    return Outcome(accuracies, sum(last) / len(last), ranks, events)


def _train(task: Task, model, allocator, optimizer: AdamW, seed: int) -> list[float]:
    schedule = LinearLR(optimizer, 1.0, 0.0, total_iters=task.steps)
    if allocator is not None:
        allocator.attach(optimizer)
    found = []
    batches = task.losses(model, seed)
    for _ in range(task.steps):
        loss = next(batches)
        penalty = 0.0
        if isinstance(allocator, rw.RankAllocator):
            penalty = PENALTY_WEIGHT * allocator.orthogonality_penalty("mean_norm")
        optimizer.zero_grad()
        (loss + penalty).backward()
        optimizer.step()
        schedule.step()
        found.append(loss.item())
    return found
