"""A small model, the same in every process, and the ways in which FSDP shards it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import rankwise as rw


def base(hidden: int = 7) -> nn.Module:
    """[.., 8] -> [.., 5]."""
    torch.manual_seed(0)
    layers = {"up": nn.Linear(8, hidden), "tanh": nn.Tanh(), "down": nn.Linear(hidden, 8)}
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    model.add_module("head", nn.Linear(8, 5))
    return model


def adapted(config=None, hidden: int = 7) -> nn.Module:
    """Two adapted layers over base(), and a head trained whole; E and B are not zero."""
    model = base(hidden)
    if config is None:
        config = rw.LoRAConfig(rank=3, target_modules=["up", "down"], modules_to_save=["head"])
    rw.apply_lora(model, config)
    with torch.no_grad():
        for parameter in trained(model):
            parameter.normal_(std=0.3)
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _root(model: nn.Module, mesh, **options) -> None:
    fully_shard(model, mesh=mesh, **options)


def _blocks(model: nn.Module, mesh) -> None:
    for layer in (model.up, model.down, model.head):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _some(model: nn.Module, mesh) -> None:
    fully_shard(model.up, mesh=mesh)


def _replicated(model: nn.Module, mesh) -> None:
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "shards")))


WAYS: dict[str, Callable] = {
    "root": _root,
    "blocks": _blocks,
    "one layer": _some,
    "replicated": _replicated,
    "resharded after forward": lambda m, mesh: _root(m, mesh, reshard_after_forward=True),
    "in bfloat16": lambda m, mesh: _root(
        m, mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    ),
}


def sharded(way: str, processes: int = 2, config=None) -> nn.Module:
    """adapted(), sharded over all processes."""
    model = adapted(config)
    WAYS[way](model, init_device_mesh("cpu", (processes,)))
    return model


def inputs(rank: int) -> Tensor:
    """Another batch [4, 8] in every process."""
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(100 + rank))


def full(tensor: Tensor) -> Tensor:
    """A copy of all of a tensor, sharded or not."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()
