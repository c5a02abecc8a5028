"""A task for `rankwise sweep`: scikit-learn's digits 5 to 9, for a network trained on 0 to 4.

`rankwise sweep examples/sweep_digits.py --ranks 1,8 --rates 1e-3,4e-3,1.6e-2 -o build/sweep`
"""

import copy
from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import rankwise as rw

found = load_digits()
PIXELS = torch.tensor(found.images, dtype=torch.float32).flatten(1) / 16
LABELS = torch.tensor(found.target)
NEW = (LABELS >= 5).nonzero().flatten()

EXAMPLES = len(NEW)
CONFIG = rw.LoRAConfig(target_modules=["0", "2"], modules_to_save=["4"])


@cache
def base() -> nn.Module:
    """The same for all trainings, whatever their seeds."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
        )
        return fitted(model, (LABELS < 5).nonzero().flatten(), rate=3e-3, steps=100)


def new_model() -> nn.Module:
    return copy.deepcopy(base())


def train(
    config: rw.LoRAConfig, rate: float, train: list[int], validation: list[int], seed: int
) -> float:
    """The part of the validation's digits that it tells after training."""
    torch.manual_seed(seed)
    model = new_model()
    model[-1].reset_parameters()
    fitted(rw.apply_lora(model, config), NEW[train], rate, steps=100)
    with torch.no_grad():
        own = NEW[validation]
        return (model(PIXELS[own]).argmax(1) == LABELS[own]).double().mean().item()


def fitted(model: nn.Module, rows: Tensor, rate: float, steps: int) -> nn.Module:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    for _ in range(steps):
        own = rows[torch.randint(len(rows), (32,))]
        optimizer.zero_grad()
        F.cross_entropy(model(PIXELS[own]), LABELS[own]).backward()
        optimizer.step()
    return model
