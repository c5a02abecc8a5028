# The one table of samples every test of lora_linear runs over, and the tensors of a sample.
"""SAMPLES is the union of three blocks and a list of edges, built by fixed rules:

    numbers   dtype x rank x dropout
    geometry  shape x stride of x, each in float64 and in one other dtype with the other layout
    gradients all 64 subsets of {x, W, b, A, B, E}, in float64
    edges     sizes and settings where code tends to break

In each block the remaining dimensions are drawn by a hash of the sample's number, so that all
values and (test_samples.py) all pairs of values of two dimensions meet somewhere in the table.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch

DTYPES = {  # name: (input, weight and bias; lora_A, lora_B and lora_E)
    "float64": (torch.float64, torch.float64),
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "bfloat16_float32": (torch.bfloat16, torch.float32),
    "float16_float32": (torch.float16, torch.float32),
}
SHAPES = {  # name: (leading dimensions, in, out)
    "1d": ((), 9, 8),
    "2d": ((5,), 8, 9),
    "3d": ((2, 3), 8, 6),
    "4d": ((2, 1, 3), 6, 5),
    "empty": ((0,), 6, 5),
    "empty3d": ((2, 0), 5, 6),
    "token": ((1,), 9, 4),
    "odd": ((7,), 13, 11),
    "wide": ((3,), 4, 17),
    "tall": ((3,), 17, 4),
}
STRIDES = ("contiguous", "transposed", "stepped", "expanded", "narrowed")
RANKS = {
    "r0": (0, 0),
    "r1": (1, 1),
    "r3": (3, 3),
    "r8": (8, 8),
    "r3of8": (3, 8),
}  # (rank, capacity)
GATES = ("none", "given", "zeros")
DROPOUTS = (0.0, 0.1, 0.5, 1.0)
LAYOUTS = ("linear", "conv1d")
SCALINGS = (1.0, 2.0, 0.37)
OPERANDS = ("contiguous", "strided")  # strides of bias, A, B, E and of a linear weight
GRAD_OUTPUTS = ("contiguous", "transposed", "expanded")
NAMES = {"x": "input", "W": "weight", "b": "bias", "A": "lora_A", "B": "lora_B", "E": "lora_E"}


def subsets(names: str = "xWbABE") -> list[str]:
    return [
        "".join(n for n, k in zip(names, keep, strict=True) if k)
        for keep in product((0, 1), repeat=len(names))
    ]


@dataclass(frozen=True)
class Sample:
    dtype: str = "float64"
    shape: tuple[tuple[int, ...], int, int] = SHAPES["2d"]
    stride: str = "contiguous"
    rank: tuple[int, int] = RANKS["r3"]
    gate: str = "given"
    dropout: float = 0.0
    bias: bool = True
    grads: str = "xWbABE"
    layout: str = "linear"
    scaling: float = 2.0
    operands: str = "contiguous"
    grad_output: str = "contiguous"

    @property
    def id(self) -> str:
        lead, in_features, out_features = self.shape
        size = "x".join(map(str, (*lead, in_features)))
        rank, capacity = self.rank
        return (
            f"{self.dtype}-{size}to{out_features}-{self.stride}-r{rank}of{capacity}"
            f"-E{self.gate}-p{self.dropout}-{'bias' if self.bias else 'nobias'}"
            f"-grad{self.grads or 'none'}-{self.layout}-s{self.scaling}"
            f"-{self.operands}-dy{self.grad_output}"
        )

    def sane(self) -> Sample:
        """Without gradients of tensors the sample does not have."""
        absent = ("" if self.bias else "b") + ("E" if self.gate == "none" else "")
        return replace(self, grads="".join(n for n in self.grads if n not in absent))


FREE = {  # what a block leaves open is drawn from these
    "shape": tuple(SHAPES.values()),
    "stride": STRIDES,
    "rank": tuple(RANKS.values()),
    "gate": GATES,
    "dropout": DROPOUTS,
    "bias": (True, False),
    "grads": tuple(s for s in subsets() if len(s) >= 4),
    "layout": LAYOUTS,
    "scaling": SCALINGS,
    "operands": OPERANDS,
    "grad_output": GRAD_OUTPUTS,
}


def _drawn(block: str, number: int, **fixed: object) -> Sample:
    def pick(name: str) -> object:
        digest = hashlib.sha256(f"{block} {number} {name}".encode()).digest()
        return FREE[name][int.from_bytes(digest[:8], "little") % len(FREE[name])]

    return Sample(
        **{name: fixed.get(name, pick(name)) for name in FREE}, dtype=fixed["dtype"]
    ).sane()


def _numbers() -> Iterator[Sample]:
    for i, (dtype, rank, p) in enumerate(product(DTYPES, RANKS.values(), DROPOUTS)):
        yield _drawn("numbers", i, dtype=dtype, rank=rank, dropout=p)


def _geometry() -> Iterator[Sample]:
    others = [name for name in DTYPES if name != "float64"]
    for i, (shape, stride) in enumerate(product(SHAPES.values(), STRIDES)):
        for j, dtype in enumerate(("float64", others[(i + i // 5) % len(others)])):
            layout = LAYOUTS[(i + j) % 2]
            yield _drawn(
                "geometry", 2 * i + j, dtype=dtype, shape=shape, stride=stride, layout=layout
            )


def _gradients() -> Iterator[Sample]:
    for i, grads in enumerate(subsets()):
        yield _drawn("gradients", i, dtype="float64", grads=grads, bias=True, gate=GATES[1 + i % 2])


def _edges() -> Iterator[Sample]:
    plain = Sample(dropout=0.1)
    yield replace(plain, rank=(0, 4))  # storage there, nothing active
    yield replace(plain, rank=(4, 4), shape=((3,), 4, 4))  # rank = min(in, out)
    yield replace(plain, shape=((3,), 1, 1), rank=(1, 1))
    yield replace(plain, shape=((3,), 0, 4))  # no input features
    yield replace(plain, shape=((3,), 4, 0))  # no output features
    yield replace(plain, shape=((0,), 0, 0), rank=(0, 0))
    yield replace(plain, shape=((1, 1, 1, 2), 3, 2), stride="narrowed")  # 5-D
    yield replace(plain, scaling=0.0)
    yield replace(plain, scaling=-1.5)
    yield replace(plain, dropout=1e-6)  # rounds to no dropout
    yield replace(plain, dropout=0.999999)  # rounds to dropping everything
    yield replace(plain, dropout=2.0**-16)  # the smallest real dropout
    for dtype in DTYPES:  # past one vector, one cache tile and one thread's share
        if dtype != "float64":
            yield replace(plain, dtype=dtype, shape=((130,), 96, 40), rank=(8, 8), grads="xWbABE")
            yield replace(plain, dtype=dtype, shape=((3, 50), 40, 72), rank=(5, 16), dropout=0.0,
                          stride="narrowed", layout="conv1d", operands="strided")  # fmt: skip
            yield replace(plain, dtype=dtype, shape=((), 200, 65), rank=(16, 16), dropout=0.5)


SAMPLES = list({s.id: s for s in [*_numbers(), *_geometry(), *_gradients(), *_edges()]}.values())


def leaves(sample: Sample, device: str = "cpu") -> dict[str, torch.Tensor]:
    """The contiguous tensors behind a sample, by NAMES' values and grad_output; the same ever."""
    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(sample.id.encode()).digest()[:6], "little")
    )
    base, adapter = DTYPES[sample.dtype]
    lead, n_in, n_out = sample.shape
    capacity = sample.rank[1]
    strided = sample.operands == "strided"
    padding = 3 if strided else 0

    def normal(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    input_shape = {
        "contiguous": (*lead, n_in),
        "transposed": (n_in, *reversed(lead)) if lead else (n_in, 3),
        "stepped": (*lead, 2 * n_in),
        "expanded": (*(1 for _ in lead), n_in) if lead else (1,),
        "narrowed": (*lead[:-1], lead[-1] + 2, n_in + 5) if lead else (n_in + 5,),
    }[sample.stride]
    dy_shape = {
        "contiguous": (*lead, n_out),
        "transposed": (n_out, *reversed(lead)),
        "expanded": (*lead, 1),
    }[sample.grad_output]
    into, through = max(n_in, 1) ** -0.5, max(sample.rank[0], 1) ** -0.5
    found = {
        "input": normal(input_shape, base),
        "weight": normal(
            (n_in, n_out) if sample.layout == "conv1d" else (n_out, n_in + padding), base, into
        ),
        "bias": normal((2 * n_out if strided else n_out,), base) if sample.bias else None,
        "lora_A": normal((n_in, capacity) if strided else (capacity, n_in), adapter, into),
        "lora_B": normal((capacity, n_out) if strided else (n_out, capacity), adapter, through),
        "lora_E": normal((capacity, 2 if strided else 1), adapter),
        "grad_output": normal(dy_shape, base),
    }
    if sample.gate == "none":
        found["lora_E"] = None
    elif sample.gate == "zeros":
        found["lora_E"].zero_()
    return {name: tensor.to(device) for name, tensor in found.items() if tensor is not None}


def views(sample: Sample, leaf: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The strided tensors the op receives, as differentiable views of `leaves`."""
    lead, n_in, n_out = sample.shape
    strided = sample.operands == "strided"
    view = dict(leaf)
    x = leaf["input"]
    if sample.stride == "transposed":
        view["input"] = x.permute(*reversed(range(x.dim()))) if lead else x.select(1, 1)
    elif sample.stride == "stepped":
        view["input"] = x[..., ::2]
    elif sample.stride == "expanded":
        view["input"] = x.expand(*lead, n_in)
    elif sample.stride == "narrowed":
        view["input"] = (x.narrow(-2, 1, lead[-1]) if lead else x).narrow(-1, 3, n_in)
    view["weight"] = leaf["weight"].t() if sample.layout == "conv1d" else leaf["weight"][:, :n_in]
    if strided:
        view["lora_A"], view["lora_B"] = leaf["lora_A"].t(), leaf["lora_B"].t()
        if "bias" in leaf:
            view["bias"] = leaf["bias"][::2]
        if "lora_E" in leaf:
            view["lora_E"] = leaf["lora_E"][:, :1]
    dy = leaf["grad_output"]
    if sample.grad_output == "transposed":
        view["grad_output"] = dy.permute(*reversed(range(dy.dim())))
    elif sample.grad_output == "expanded":
        view["grad_output"] = dy.expand(*lead, n_out)
    return view


def tensors(sample: Sample, device: str = "cpu") -> dict[str, torch.Tensor]:
    """The strided tensors as autograd leaves, requiring the sample's gradients."""
    seen = views(sample, leaves(sample, device))
    found = {name: tensor.detach() for name, tensor in seen.items()}
    for name in sample.grads:
        found[NAMES[name]].requires_grad_()
    return found


def arguments(sample: Sample, tensor: dict[str, torch.Tensor]) -> tuple[tuple, dict]:
    """Positional and keyword arguments of the public op; `rank` only where it is below capacity."""
    rank, capacity = sample.rank
    args = tuple(tensor.get(name) for name in NAMES.values())
    kwargs = {"scaling": sample.scaling, "dropout_p": sample.dropout}
    return args, kwargs | ({"rank": rank} if rank != capacity else {})
