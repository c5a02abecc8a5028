# Trainings in several processes whose allocators compare what they decide.
from __future__ import annotations

import torch
from allocation_models import network, trained
from torch import Tensor, nn

import rankwise as rw

INTERVAL = 4
OPTIONS = dict(total_steps=40, final_steps=8, warmup_steps=2, allocation_interval=INTERVAL)
KINDS = ("AdaLoRA", "spectral")


def made(
    kind: str, group="default", **options
) -> tuple[nn.Module, rw.RankAllocator | rw.SpectralAllocator]:
    """A model in float64, the same in every process, with its allocator."""
    if kind == "AdaLoRA":
        model, first = network(**OPTIONS | options)
        return model, rw.RankAllocator(model, first.config, group=group)
    torch.manual_seed(3)
    config = rw.SpectralConfig(
        target_modules=["0", "2"], initial_rank=3, ramp_steps=2, probes=1, **OPTIONS | options
    )
    layers = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)
    model = rw.apply_lora(nn.Sequential(*layers).double(), config)
    with torch.no_grad():
        for name in ("0", "2"):
            layer = model.get_submodule(name)
            layer.lora_B[:, : layer.rank].normal_(std=0.5)
    return model, rw.SpectralAllocator(model, config, group=group)


class Training:
    """AdamW steps, whose gradients may be changed before, and what the allocator began with."""

    def __init__(self, kind: str, **options) -> None:
        self.model, self.allocator = made(kind, **options)
        self.optimizer = torch.optim.AdamW(trained(self.model), 0.02)
        self.optimizer.register_step_post_hook(lambda *_: self._remember())
        self.allocator.attach(self.optimizer)
        self.before: dict[str, Tensor] = {}

    def step(self, x: Tensor, y: Tensor, change=None, model=None) -> None:
        self.optimizer.zero_grad()
        ((model or self.model)(x) - y).square().mean().backward()
        if change is not None:
            change(self.model)
        self.optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """All that an allocator's step may write, copied."""
        state = {f"model.{n}": p for n, p in self.model.named_parameters()}
        state |= {f"gradient.{n}": p.grad for n, p in self.model.named_parameters()}
        state |= {f"allocator.{n}": x for n, x in self.allocator.state_dict().items()}
        for i, slots in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{i}.{name}": x for name, x in slots.items()}
        state |= {f"rank.{n}": torch.tensor(r) for n, r in self.allocator.ranks.items()}
        return {n: x.detach().clone() for n, x in state.items() if x is not None}

    def _remember(self) -> None:
        self.before = self.state()
