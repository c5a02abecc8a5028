# Small AdaLoRA models of PEFT's and their training, the same for stock and accelerated ones.
from __future__ import annotations

from dataclasses import dataclass, fields

import peft
import torch
from peft_models import bert
from torch import Tensor, nn

STEPS = 30


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


@dataclass
class Schedule:
    """PEFT's options of a run."""

    init_r: int = 6
    target_r: int = 2
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    total_step: int = STEPS
    seed: int = 0

    def config(self, **options) -> peft.AdaLoraConfig:
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "seed"}
        return peft.AdaLoraConfig(**own, **options)

    def model(self) -> peft.PeftModel:
        torch.manual_seed(self.seed)
        return peft.get_peft_model(Tower(), self.config(target_modules=["first", "second"]))

    def classifier(self) -> peft.PeftModel:
        torch.manual_seed(self.seed)
        return peft.get_peft_model(
            bert(), self.config(target_modules=["query", "value"], task_type="SEQ_CLS")
        )


def sigmas(model: nn.Module) -> list[Tensor]:
    """lora_E of the trainable adapter."""
    return [p.detach() for n, p in model.named_parameters() if n.endswith("lora_E.default")]


def masks(model: nn.Module) -> list[list[bool]]:
    return [(sigma != 0).view(-1).tolist() for sigma in sigmas(model)]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(
    model: peft.PeftModel,
    first: int | None = None,
    steps: int = STEPS,
    attach: bool = False,
    dtype: torch.dtype = torch.float32,
) -> list[list[list[bool]]]:
    """The masks after each step. `first`: of the numbers given by hand; None: none are."""
    random = torch.Generator().manual_seed(1 if first is None else first)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    if attach:
        model.base_model.rankallocator.attach(optimizer)
        random.manual_seed(1)
    found = []
    for step in range(steps):
        x = torch.randn(4, 8, generator=random).to(dtype)
        model(x).pow(2).mean().backward()
        optimizer.step()
        if first is not None:
            model.base_model.update_and_allocate(first + step)
        optimizer.zero_grad()
        found.append(masks(model))
    return found
