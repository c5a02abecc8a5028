# What serves a type on the CPU, and that a row's result is its own.
import pytest
import torch
from samples import DTYPES
from tolerances import assert_same_bits

import rankwise

MICRO, ATEN = "cpu (micro-kernel)", "cpu (ATen)"


def on_micro_kernel(dtype: str) -> bool:
    base, _ = DTYPES[dtype]
    return rankwise.ops.path(torch.empty(1, dtype=base)) == MICRO


def test_paths_are_named():
    assert rankwise.ops.path(torch.empty(1, dtype=torch.float64)) == ATEN
    assert rankwise.ops.path(torch.empty(1, dtype=torch.float16)) == ATEN
    capability = torch.backends.cpu.get_cpu_capability()
    if "AVX512" in capability:  # what its float32 products were measured with
        assert rankwise.ops.path(torch.empty(1)) == MICRO


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bfloat16_float32"])
def test_without_onednn_a_layer_takes_the_other_path(dtype):
    """Also between forward and backward."""
    base, adapter = DTYPES[dtype]
    torch.manual_seed(5)
    x, W = torch.randn(40, 24).to(base).requires_grad_(), torch.randn(16, 24).to(base)
    A, B = torch.randn(3, 24).to(adapter), torch.randn(16, 3).to(adapter)

    def run(forward: bool, backward: bool) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.backends.mkldnn.flags(enabled=forward):
            assert forward or rankwise.ops.path(W) == ATEN
            torch.manual_seed(6)
            y = rankwise.ops.lora_linear(x, W, None, A, B, scaling=2.0, dropout_p=0.2)
        with torch.backends.mkldnn.flags(enabled=backward):
            return y.detach(), torch.autograd.grad(y, x, torch.ones_like(y))[0]

    expected = run(True, True)
    for flags in ((False, False), (True, False), (False, True)):
        for got, want in zip(run(*flags), expected, strict=True):
            assert (got - want).norm() <= 2 * torch.finfo(base).eps * want.norm()


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("dtype", filter(on_micro_kernel, DTYPES))
def test_a_row_does_not_depend_on_the_others(dtype, dropout_p):
    """Of y and of dx, for numbers of rows that take other kernels, panels and tiles."""
    base, adapter = DTYPES[dtype]
    torch.manual_seed(3)
    x, W = torch.randn(1100, 260).to(base), torch.randn(200, 260).to(base)
    A, B = torch.randn(5, 260).to(adapter), torch.randn(200, 5).to(adapter)
    dy = torch.randn(1100, 200).to(base)

    def rows(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(4)
        part = x[:count].clone().requires_grad_()
        y = rankwise.ops.lora_linear(part, W, None, A, B, scaling=2.0, dropout_p=dropout_p)
        return y.detach(), torch.autograd.grad(y, part, dy[:count])[0]

    y, dx = rows(1100)
    for count in (1, 2, 31, 33, 64, 127, 1024, 1025):
        for name, got, expected in zip(("y", "dx"), rows(count), (y, dx), strict=True):
            assert_same_bits(got, expected[:count], f"{name} of {count} rows")
