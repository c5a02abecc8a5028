# The layers under test, with factors that are not zero, and what they should compute, in float64.
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from tolerances import assert_same_bits
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import rankwise as rw

IN, OUT, ROWS, DIM = 6, 10, 9, 4

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# (base dtype, factor dtype): all that an adapter may have.
DTYPES = [(d, d) for d in FLOATS] + [(d, torch.float32) for d in FLOATS[2:]]


def linear(dtype: torch.dtype, **options) -> nn.Module:
    return rw.nn.LoRALinear(IN, OUT, dtype=dtype, **options)


def adalora(dtype: torch.dtype, **options) -> nn.Module:
    return rw.nn.AdaLoRALinear(IN, OUT, dtype=dtype, **options)


def conv1d(dtype: torch.dtype, **options) -> nn.Module:
    base = Conv1D(OUT, IN).to(dtype)
    with torch.no_grad():
        base.bias.normal_()
    return rw.nn.LoRALinear.from_linear(base, **options)


def embedding(dtype: torch.dtype, **options) -> nn.Module:
    return rw.nn.LoRAEmbedding(ROWS, DIM, padding_idx=2, dtype=dtype, **options)


KINDS: dict[str, Callable[..., nn.Module]] = {
    "linear": linear,
    "adalora": adalora,
    "conv1d": conv1d,
    "embedding": embedding,
}


def factors(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The active adapter's factors."""
    found = {name: getattr(layer, name) for name in ("lora_A", "lora_B", "lora_E")}
    return {name: value for name, value in found.items() if value is not None}


def randomise(layer: nn.Module, seed: int = 1) -> nn.Module:
    """Gives the active factors multiples of 1/8 in [-1, 1]: sums of their products are exact."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for factor in factors(layer).values():
            factor.copy_(torch.randint(-8, 9, factor.shape, generator=generator) / 8)
    return layer


def make(kind: str, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    """A layer of rank 4 and scaling 2 (unless told otherwise) whose update is not zero."""
    return randomise(KINDS[kind](dtype, **{"rank": 4, "alpha": 8.0, **options}))


def example(layer: nn.Module, seed: int = 2) -> Tensor:
    """An input: [2, 3] indices or [2, 3, IN]."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(layer, nn.Embedding):
        return torch.randint(0, ROWS, (2, 3), generator=generator)
    return torch.randn(2, 3, IN, generator=generator, dtype=torch.float64).to(layer.weight.dtype)


def exact_weight(layer: nn.Module, base: Tensor) -> Tensor:
    """base + scaling * B diag(E) A in base's layout, float64."""
    A = layer.lora_A.detach().double()[: layer.rank]
    B = layer.lora_B.detach().double()[:, : layer.rank]
    if layer.lora_E is not None:
        A = A * layer.lora_E.detach().double()[: layer.rank]
    delta = layer.scaling * (B @ A)
    # IN != OUT and ROWS != DIM, so the shape tells the layout.
    return base.detach().double() + (delta if delta.shape == base.shape else delta.t())


def computed(layer: nn.Module, weight: Tensor, input: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """What a plain layer with this float64 weight gives, and the size of the terms summed."""
    if isinstance(layer, nn.Embedding):
        value = weight[input].numpy()
        return value, np.full(value.shape, float(weight.abs().max()) + 8.0)
    matrix = weight if weight.shape == (OUT, IN) else weight.t()
    bias = layer.bias.detach().double()
    flat = input.detach().double()
    # The factors are at most 1, rank 4 and scaling 2: the update's terms sum to at most 8 |x|.
    size = flat.abs() @ (matrix.abs() + 8.0).t() + bias.abs()
    return (flat @ matrix.t() + bias).numpy(), size.numpy()


# (significant bits, exponent of the smallest positive number)
_FORMATS = {
    torch.float64: (53, -1074),
    torch.float32: (24, -149),
    torch.bfloat16: (8, -133),
    torch.float16: (11, -24),
}


def nearest(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 rounded once to the nearest number of `dtype`, ties to even, by integer arithmetic.

    Not Tensor.to(): that takes bfloat16 and float16 by way of float32, which rounds twice.
    """
    values = exact.numpy()
    bits, smallest = _FORMATS[dtype]
    _, exponent = np.frexp(values)
    step = np.maximum(exponent - bits, smallest)
    rounded = np.ldexp(np.rint(np.ldexp(values, -step)), step)
    rounded[np.abs(rounded) > torch.finfo(dtype).max] = np.inf
    return torch.from_numpy(rounded).to(dtype)


def assert_nearest(weight: Tensor, exact: Tensor, what: str = "merged weight") -> None:
    """The float64 sum rounded once, to the bit; in float64 up to the sum's own roundings, whose
    order differs between machines."""
    if weight.dtype == torch.float64:
        torch.testing.assert_close(weight.detach(), exact.detach(), rtol=1e-14, atol=1e-14)
    else:
        assert_same_bits(weight, nearest(exact, weight.dtype), what)
