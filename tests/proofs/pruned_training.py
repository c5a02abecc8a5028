"""A small training that prunes again and again: a fresh adapter follows each schedule."""

from __future__ import annotations

import copy
import os

import torch
from torch import nn

import rankwise as rw

ROUND = 200  # steps of a schedule; ranks are final from step 140 on
TARGETS = ["0", "2"]
METHODS = {
    "adalora": (rw.RankAllocator, rw.AdaLoRAConfig(
        initial_rank=4, target_rank=2, total_steps=ROUND, warmup_steps=20, final_steps=60,
        allocation_interval=10, dropout=0.1, target_modules=TARGETS, modules_to_save=["4"],
    )),
    "spectral": (rw.SpectralAllocator, rw.SpectralConfig(
        initial_rank=2, max_rank=5, total_steps=ROUND, warmup_steps=20, final_steps=60,
        allocation_interval=10, initial_budget=100, final_budget=50, probes=1, dropout=0.1,
        target_modules=TARGETS, modules_to_save=["4"],
    )),
}  # fmt: skip


class PrunedTraining:
    """Its steps are a function of the checkpoint that they begin from and of their numbers."""

    def __init__(self, method: str) -> None:
        torch.manual_seed(1)
        self.method = method
        self.model = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3)
        ).train()
        rw.apply_lora(self.model, self._config)
        self._begin()

    @property
    def _config(self):
        return METHODS[self.method][1]

    def _begin(self) -> None:
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad])
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.03, ROUND + 1)
        self.allocator = METHODS[self.method][0](self.model, self._config)
        self.allocator.attach(self.optimizer)

    def _begin_again(self) -> None:
        self.allocator.detach()
        rw.delete_adapter(self.model, "default")
        rw.add_adapter(self.model, "default", self._config)
        rw.activate_adapter(self.model, "default")
        self._begin()

    def step(self, number: int) -> None:
        """The step after `number` others."""
        if number and number % ROUND == 0:
            assert self.allocator.frozen
            self._begin_again()
        x = torch.randn(9, 6, generator=torch.Generator().manual_seed(number))
        self.optimizer.zero_grad()
        (self.model(x) - torch.sin(3 * x[:, :3])).square().mean().backward()
        self.optimizer.step()
        self.scheduler.step()

    @property
    def _parts(self) -> tuple:
        return self.model, self.optimizer, self.allocator, self.scheduler

    def save(self, folder: str | os.PathLike, step: int) -> None:
        rw.save_checkpoint(folder, *self._parts, step=step)

    def load(self, folder: str | os.PathLike) -> int:
        return rw.load_checkpoint(folder, *self._parts)

    def state(self) -> list:
        """All that the training has come to, in memory of its own."""
        states = [part.state_dict() for part in self._parts]
        return copy.deepcopy([*states, torch.get_rng_state()])
