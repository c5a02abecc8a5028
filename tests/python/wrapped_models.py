# Wrappers around whole models and around their parts, as torch and users make them.
from __future__ import annotations

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
    offload_wrapper,
)
from torch.optim.swa_utils import AveragedModel


class Hiding(nn.Module):
    """A wrapper of nobody's list, which state_dict() hides."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)

    def state_dict(self, *args, **options):
        return self.inner.state_dict(*args, **options)


class MyDataParallel(nn.DataParallel):
    """A subclass of the user's."""


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="aot_eager")


def compiled_in_place(module: nn.Module) -> nn.Module:
    module.compile(backend="aot_eager")
    return module


WRAPPERS = {
    "compiled": compiled,
    "compiled in place": compiled_in_place,
    "data-parallel": nn.DataParallel,
    "data-parallel subclass": MyDataParallel,
    "averaged": AveragedModel,
    "checkpointed": checkpoint_wrapper,
    "offloaded": offload_wrapper,
    "quantised later": torch.ao.quantization.QuantWrapper,
    "hiding": Hiding,
    "compiled data-parallel": lambda module: compiled(nn.DataParallel(module)),
    "checkpointed compiled": lambda module: checkpoint_wrapper(compiled(module)),
    "compiled checkpointed": lambda module: compiled(checkpoint_wrapper(module)),
    "averaged twice": lambda module: AveragedModel(AveragedModel(module)),
}


def plain() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double()


def wrapped(name: str, model: nn.Module | None = None) -> nn.Module:
    return WRAPPERS[name](plain() if model is None else model)


def parts_wrapped(name: str, model: nn.Module | None = None) -> nn.Module:
    """A model with wrappers around its layers."""
    model = plain() if model is None else model
    for key in ("0", "2"):
        model._modules[key] = WRAPPERS[name](model._modules[key])
    return model
