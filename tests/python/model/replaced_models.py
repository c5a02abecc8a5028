"""A body and a head, for tests that put others in their place."""

import torch
from torch import nn

import rankwise as rw
from rankwise.config import LoRAConfig

WHOLE = LoRAConfig(rank=2, target_modules=["body.0"], modules_to_save=["head"])
LOW = LoRAConfig(rank=2, target_modules=["body.0", "body.2"])


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(8, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.dense(x).tanh())


class Classifier(nn.Module):
    def __init__(self, head: nn.Module):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.head = head

    def forward(self, x):
        return self.head(self.body(x))


def classifier(config: LoRAConfig = WHOLE, head: type = Head) -> nn.Module:
    torch.manual_seed(0)
    return rw.apply_lora(Classifier(head()), config)
