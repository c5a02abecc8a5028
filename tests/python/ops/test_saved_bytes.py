# What the op saves for backward: x by reference, hidden, and at most 1 bit per element of dropout.
import pytest
import torch
from peft_layer import peft_layer
from samples import DTYPES
from torch.autograd.graph import saved_tensors_hooks

import rankwise

TOKENS, IN, OUT, RANK = 96, 256, 192, 8
SEED_BYTES = 8


class Saved:
    """Records the tensors saved for backward while active; `new` are those nobody held before."""

    def __init__(self, held: list[torch.Tensor]):
        self.held = {t.untyped_storage().data_ptr() for t in held}
        self.all: list[torch.Tensor] = []

    def __enter__(self):
        self.hooks = saved_tensors_hooks(lambda t: self.all.append(t) or t, lambda t: t)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def new_bytes(self) -> int:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.all}
        return sum(size for place, size in storages.items() if place not in self.held)


def tensors(dtype: str, gated: bool, device: str = "cpu") -> list[torch.Tensor | None]:
    base, adapter = DTYPES[dtype]
    return [
        torch.randn(TOKENS, IN).to(device, base),
        torch.randn(OUT, IN).to(device, base),
        torch.randn(OUT).to(device, base),
        torch.randn(RANK, IN).to(device, adapter).requires_grad_(),
        torch.randn(OUT, RANK).to(device, adapter).requires_grad_(),
        torch.randn(RANK, 1).to(device, adapter).requires_grad_() if gated else None,
    ]


def check(dtype: str, p: float, gated: bool, input_grad: bool, device: str = "cpu") -> None:
    x, weight, bias, A, B, E = arguments = tensors(dtype, gated, device)
    x.requires_grad_(input_grad)
    with Saved([t for t in arguments if t is not None]) as mine:
        y = rankwise.ops.lora_linear(*arguments, scaling=2.0, dropout_p=p)
    places = [t.data_ptr() for t in mine.all if t.shape == x.shape]
    assert places == [x.data_ptr()], "x must be saved once, by reference"
    hidden_bytes = TOKENS * RANK * A.element_size()
    mask_bytes = max(TOKENS * IN // 8, SEED_BYTES) if p else 0
    assert mine.new_bytes() <= hidden_bytes + mask_bytes

    layer = peft_layer(weight, bias, A, B, scaling=2.0, dropout=p)
    peft_x = x.detach().requires_grad_(input_grad)
    with Saved([peft_x, *layer.parameters()]) as peft:
        peft_y = layer(peft_x)
    print(f"{dtype}, dropout {p}: rankwise {mine.new_bytes()} B, PEFT {peft.new_bytes()} B")
    assert mine.new_bytes() <= peft.new_bytes()
    assert y.shape == peft_y.shape


@pytest.mark.parametrize("input_grad", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes(dtype, p, gated, input_grad):
    check(dtype, p, gated, input_grad)


def test_nothing_is_saved_without_gradients():
    arguments = [None if t is None else t.detach() for t in tensors("float32", True)]
    with Saved(arguments) as saved:
        rankwise.ops.lora_linear(*arguments, scaling=2.0, dropout_p=0.1)
    assert not saved.all


@pytest.mark.parametrize(
    "make", [lambda x: x.t().contiguous().t(), lambda x: x[:, ::2], lambda x: x[:1].expand_as(x)]
)
def test_a_strided_input_is_saved_by_reference_too(make):
    _, weight, bias, A, B, E = tensors("float32", True)
    x = make(torch.randn(TOKENS, 2 * IN))[:, :IN]
    with Saved([x, weight, bias, A, B, E]) as saved:
        rankwise.ops.lora_linear(x, weight, bias, A, B, E, scaling=2.0)
    assert saved.new_bytes() <= TOKENS * RANK * A.element_size()
