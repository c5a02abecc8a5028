"""Small trainings of each method and optimizer, and what they come to, byte for byte."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import rankwise as rw

STEPS = 14
TARGETS = ["first", "second"]
METHODS = {
    "lora": rw.LoRAConfig(rank=3, dropout=0.2, target_modules=TARGETS, modules_to_save=["head"]),
    "adalora": rw.AdaLoRAConfig(
        initial_rank=4, target_rank=2, total_steps=12, warmup_steps=1, final_steps=4,
        allocation_interval=2, dropout=0.2, target_modules=TARGETS, modules_to_save=["head"],
    ),
    "spectral": rw.SpectralConfig(
        initial_rank=2, max_rank=5, total_steps=14, warmup_steps=1, final_steps=2, min_age=2,
        allocation_interval=3, initial_budget=100, final_budget=40, probes=1, dropout=0.2,
        target_modules=TARGETS, modules_to_save=["head"],
    ),
}  # fmt: skip
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, 0.03, weight_decay=0.1, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
}
ALLOCATORS = {"adalora": rw.RankAllocator, "spectral": rw.SpectralAllocator}


class Network(nn.Module):
    """[batch, 6] -> [batch, 3]; its base has dropout, and averages that change as it trains."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 7)
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.1)
        self.head = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(torch.tanh(self.norm(self.first(x))))
        return self.head(torch.tanh(self.second(x)))


@dataclass
class Run:
    """A training; the seed is of the adapters, which a checkpoint must overwrite."""

    method: str
    optimizer_name: str
    seed: int = 4

    def __post_init__(self) -> None:
        config = METHODS[self.method]
        model = Network()
        torch.manual_seed(self.seed)
        self.model = rw.apply_lora(model, config).train()
        make = ALLOCATORS.get(self.method)
        self.allocator = make(self.model, config) if make else None
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = OPTIMIZERS[self.optimizer_name](trained)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.05, STEPS + 1)
        if self.allocator is not None:
            self.allocator.attach(self.optimizer)

    @property
    def parts(self) -> tuple:
        return self.model, self.optimizer, self.allocator, self.scheduler

    def train(self, steps) -> list[float]:
        losses = []
        for step in steps:
            random = torch.Generator().manual_seed(step)
            x = torch.randn(9, 6, generator=random)
            self.optimizer.zero_grad()
            loss = (self.model(x) - torch.sin(3 * x[:, :3])).square().mean()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            losses.append(loss.item())
        return losses

    def save(self, folder: Path, step: int) -> None:
        rw.save_checkpoint(folder, *self.parts, step=step)

    def load(self, folder: Path) -> int:
        return rw.load_checkpoint(folder, *self.parts)

    def state(self) -> dict:
        """All that the training has come to, in memory of its own."""
        parts = (self.model, self.optimizer, self.allocator, self.scheduler)
        states = [part and part.state_dict() for part in parts]
        return copy.deepcopy([*states, torch.get_rng_state()])


def same(a, b) -> bool:
    """Whether two states have the same types, keys and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        alike = a.dtype == b.dtype and a.shape == b.shape
        return alike and a.detach().numpy().tobytes() == b.detach().numpy().tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)
