# Inputs that are views: lazily negated, repeated, channels last, overlapping; and sizes past 2^31.
import pytest
import torch

import rankwise

VIEWS = {
    "negated": torch._neg_view,
    "imaginary part of a conjugate": lambda x: torch.complex(x, x).conj().imag,
    "expanded": lambda x: x[:, :1].expand(-1, 5, -1, -1),
    "broadcast scalar": lambda x: x[0, 0, 0, 0].expand(2, 3, 4, 6),
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "reversed": lambda x: x.transpose(0, 2).flip(0),
    "overlapping windows": lambda x: x.flatten()[:20].unfold(0, 6, 1),
}


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_is_as_good_as_its_copy(view):
    weight, A, B = torch.randn(5, 6), torch.randn(2, 6), torch.randn(5, 2)
    results = []
    for copied in (False, True):
        leaf = torch.arange(144.0).sin().reshape(2, 3, 4, 6).requires_grad_()
        x = VIEWS[view](leaf)
        x = x.resolve_conj().resolve_neg().clone().contiguous() if copied else x
        assert copied or not x.is_contiguous() or x.is_neg()
        y = rankwise.ops.lora_linear(x, weight, None, A, B, scaling=2.0)
        y.sin().sum().backward()
        results.append((y.detach(), leaf.grad))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    "rows, columns, outputs", [(2**31 + 1, 3, 2), (2, 3, 2**32), (2, 2**32, 3)]
)
def test_sizes_past_32_bits_have_their_shapes(rows, columns, outputs):
    def meta(*sizes):
        return torch.empty(sizes, device="meta", requires_grad=True)

    x, A = meta(rows, columns), meta(2, columns)
    y = rankwise.ops.lora_linear(x, meta(outputs, columns), None, A, meta(outputs, 2), scaling=2.0)
    assert y.shape == (rows, outputs)
    y.backward(torch.empty_like(y))
    assert x.grad.shape == x.shape and A.grad.shape == A.shape
