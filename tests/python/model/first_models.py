# A small model of two linear layers, its inputs, and all first values over it.
from __future__ import annotations

import torch
from torch import Tensor, nn

import rankwise as rw

CONFIG = rw.LoRAConfig(rank=4, alpha=8.0, target_modules=["0", "2"])


def plain(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(20, 24), nn.Tanh(), nn.Linear(24, 16)).to(dtype)


def rows(dtype: torch.dtype = torch.float64, count: int = 30) -> Tensor:
    return torch.randn(count, 20, generator=torch.Generator().manual_seed(3)).to(dtype)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


# Those that begin inside the base, and all.
INSIDE = {
    "pissa": lambda: rw.PiSSA(),
    "pissa_iterations": lambda: rw.PiSSA(iterations=8),
    "olora": lambda: rw.OLoRA(),
    "lora_ga": lambda: rw.LoRAGA([rows()], lambda model, _: loss(model, inputs_of(model))),
}
EVERY = {**INSIDE, "eva": lambda: rw.EVA([rows()])}


def inputs_of(model: nn.Module) -> Tensor:
    return rows(model[0].weight.dtype)


def begun(kind: str = "pissa", config: rw.LoRAConfig = CONFIG, **options) -> nn.Module:
    """plain() with an adapter that begins with these values."""
    return rw.apply_lora(plain(), config, first_values=EVERY[kind](), **options)


def trained(model: nn.Module, steps: int = 3) -> nn.Module:
    """After steps that change what it computes."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, rows()).backward()
        optimizer.step()
    return model
