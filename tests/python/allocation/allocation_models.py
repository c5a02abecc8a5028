# Small AdaLoRA models, streams of made-up gradients, training runs and byte-exact comparisons.
from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from allocation_oracle import Module, Options, Oracle
from tolerances import assert_same_bits
from torch import Tensor, nn

import rankwise as rw
from rankwise.adapted import Adapted

LETTERS = {"A": "lora_A", "B": "lora_B", "E": "lora_E"}


@dataclass
class Bench:
    """Layers side by side, for tests that write weights and gradients themselves."""

    model: nn.Module
    config: rw.AdaLoRAConfig
    allocator: rw.RankAllocator

    @property
    def layers(self) -> list[Adapted]:
        return list(self.model)

    @property
    def factors(self) -> list[Tensor]:
        return [getattr(layer, name) for layer in self.layers for name in LETTERS.values()]

    def numpy(self, gradients: bool) -> list[dict[str, np.ndarray | None]]:
        def array(tensor: Tensor) -> np.ndarray | None:
            tensor = tensor.grad if gradients else tensor.detach()
            return None if tensor is None else tensor.double().cpu().numpy().copy()

        return [{k: array(getattr(x, n)) for k, n in LETTERS.items()} for x in self.layers]

    def oracle(self) -> Oracle:
        names = Options.__dataclass_fields__
        modules = []
        for layer in self.layers:
            wide = layer.lora_A.dtype == torch.float64
            sizes = layer.in_features, layer.out_features, layer.rank
            modules.append(Module(*sizes, np.float64 if wide else np.float32))
        return Oracle(modules, Options(**{name: getattr(self.config, name) for name in names}))

    def fill(self, random: Callable[[torch.Size], Tensor], gradients: bool) -> None:
        """Overwrites all factors, or their gradients, with float64 tensors that are rounded."""
        with torch.no_grad():
            for factor in self.factors:
                value = random(factor.shape).to(factor)
                if gradients:
                    factor.grad = value
                else:
                    factor.copy_(value)


def bench(
    shapes: Sequence[tuple[int, int]],
    ranks: Sequence[int],
    dtypes: Sequence[torch.dtype] | torch.dtype = torch.float64,
    device: str = "cpu",
    **options,
) -> Bench:
    """Layers of (in, out) with these initial ranks."""
    if isinstance(dtypes, torch.dtype):
        dtypes = [dtypes] * len(shapes)
    linears = [nn.Linear(*s, dtype=d, device=device) for s, d in zip(shapes, dtypes, strict=True)]
    names = [str(i) for i in range(len(linears))]
    options.setdefault("initial_rank", max(ranks))
    pattern = dict(zip(names, ranks, strict=True))
    config = rw.AdaLoRAConfig(target_modules=names, rank_pattern=pattern, **options)
    model = rw.apply_lora(nn.ModuleList(linears), config)
    for layer, dtype in zip(model, dtypes, strict=True):
        layer.to(dtype)
    return Bench(model, config, rw.RankAllocator(model, config))


def normal(seed: int) -> Callable[[torch.Size], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)


class Network(nn.Module):
    """Three layers, [batch, 6] -> [batch, 3]."""

    def __init__(self, dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8, dtype=dtype)
        self.second = nn.Linear(8, 7, dtype=dtype)
        self.third = nn.Linear(7, 3, dtype=dtype)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(self.drop(torch.tanh(self.first(x))))))


LAYERS = ("first", "second", "third")


def network(
    dtype: torch.dtype = torch.float64, dropout: float = 0.0, seed: int = 4, **options
) -> tuple[Network, rw.RankAllocator]:
    """An adapted Network, the same for the same seed, with E and A, B of a size that matters."""
    torch.manual_seed(seed)
    options = dict(initial_rank=6, target_rank=2, total_steps=12, alpha=6.0) | options
    config = rw.AdaLoRAConfig(
        target_modules=LAYERS, dropout=dropout, adapter_dtype=dtype, **options
    )
    model = rw.apply_lora(Network(dtype, dropout), config)
    with torch.no_grad():
        for name in LAYERS:
            layer = model.get_submodule(name)
            for factor in LETTERS.values():
                getattr(layer, factor).normal_(std=0.5)
    return model, rw.RankAllocator(model, config)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs [5, 6] and targets [5, 3] of a step."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.sin(3 * x[:, :3]).to(dtype)


def loss_of(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step, trained(model)[0].dtype)
    return (model(x) - y).square().mean()


def train(model, optimizer, steps: Sequence[int]) -> list[float]:
    """Ordinary training; the losses."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def copied(state: dict) -> dict:
    return copy.deepcopy(state)


def assert_same_state(got: dict, wanted: dict, ignoring: Sequence[str] = ()) -> None:
    """Two allocator (or model) states: the same names, every tensor byte for byte."""
    assert list(got) == list(wanted)
    for name in wanted:
        if name not in ignoring:
            assert_same_bits(got[name], wanted[name], name)
