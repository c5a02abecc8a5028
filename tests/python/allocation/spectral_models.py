# A small regression over layers whose wanted changes have other ranks than the adapters begin with.
from __future__ import annotations

import torch
from torch import nn

import rankwise as rw

SHAPES = {"narrow": (12, 10, 1), "wide": (16, 14, 6), "middle": (10, 12, 3)}


class Planted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.wanted = {}
        for name, (inputs, outputs, rank) in SHAPES.items():
            layer = nn.Linear(inputs, outputs)
            self.add_module(name, layer)
            change = torch.randn(outputs, rank) @ torch.randn(rank, inputs) / 4
            self.wanted[name] = layer.weight.detach() + change

    def loss(self, step: int) -> torch.Tensor:
        random = torch.Generator().manual_seed(step)
        total = 0.0
        for name, (inputs, _, _) in SHAPES.items():
            x = torch.randn(32, inputs, generator=random)
            layer = self.get_submodule(name)
            total = total + (layer(x) - x @ self.wanted[name].T - layer.bias).square().mean()
        return total


def config(**options) -> rw.SpectralConfig:
    defaults = dict(
        initial_rank=3, alpha=6.0, total_steps=60, warmup_steps=4, final_steps=12,
        allocation_interval=4, target_modules=list(SHAPES), min_age=6,
    )  # fmt: skip
    return rw.SpectralConfig(**defaults | options)


def spectral(**options) -> tuple[Planted, rw.SpectralAllocator]:
    chosen = config(**options)
    model = Planted()
    torch.manual_seed(12)
    rw.apply_lora(model, chosen)
    return model, rw.SpectralAllocator(model, chosen)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(model: Planted, optimizer, steps) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = model.loss(step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def cost_of(model: nn.Module) -> int:
    layers = rw.summary(model).layers
    return sum(layer.rank * sum(SHAPES[layer.name][:2]) for layer in layers)
