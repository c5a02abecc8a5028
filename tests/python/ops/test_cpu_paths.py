# What serves a type on the CPU, how to choose it, and that a row's result is its own.
import re

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
    assert rankwise.ops.path(torch.empty(1, dtype=torch.float64), (8192, 4096, 4096, 16)) == ATEN
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
    without = run(False, False)
    for results in (without, run(True, False), run(False, True)):
        for got, want in zip(results, expected, strict=True):
            assert (got - want).norm() <= 2 * torch.finfo(base).eps * want.norm()
    rankwise.ops.set_cpu_path("ATen")
    for got, want in zip(run(True, True), without, strict=True):
        assert_same_bits(got, want, "with the path ATen")


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [*filter(on_micro_kernel, DTYPES)])
def test_a_row_does_not_depend_on_the_others(dtype, dropout_p):
    """Of y and of dx, for numbers of rows that take other kernels, panels and tiles.

    The products of the first halves cancel those of the second, so that what is left tells in which
    order they were added, also in bfloat16.
    """
    base, adapter = DTYPES[dtype]
    torch.manual_seed(3)
    x, W, dy = torch.randn(1100, 650), torch.randn(300, 650), torch.randn(1100, 300)
    x, W, dy = torch.cat([x, -x], 1), W.repeat(2, 2), torch.cat([dy, -dy], 1)
    x, W, dy = (t.to(base) for t in (x, W, dy))
    A, B = (1e-3 * torch.randn(size).to(adapter) for size in ((5, 1300), (600, 5)))

    def rows(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(4)
        part = x[:count].clone().requires_grad_()
        y = rankwise.ops.lora_linear(part, W, None, A, B, scaling=2.0, dropout_p=dropout_p)
        return y.detach(), torch.autograd.grad(y, part, dy[:count])[0]

    y, dx = rows(1100)
    for count in (1, 2, 31, 33, 64, 127, 1024, 1025):
        for name, got, expected in zip(("y", "dx"), rows(count), (y, dx), strict=True):
            assert_same_bits(got, expected[:count], f"{name} of {count} rows")


def step(tokens: int, n_in: int, dtype: str = "float32", p: float = 0.0) -> list[torch.Tensor]:
    base, adapter = DTYPES[dtype]
    torch.manual_seed(8)
    x, A = torch.randn(tokens, n_in).to(base), torch.randn(4, n_in).to(adapter)
    W, B = torch.randn(64, n_in).to(base), torch.randn(64, 4).to(adapter)
    leaves = [t.requires_grad_() for t in (x, A, B)]
    y = rankwise.ops.lora_linear(x, W, None, A, B, scaling=2.0, dropout_p=p)
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]


@pytest.mark.parametrize("dtype", [*filter(on_micro_kernel, DTYPES)])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_measured_times_each_kind_of_calls_once_and_computes_on_the_faster_path(dtype, p):
    def on(path: str, tokens: int) -> list[torch.Tensor]:
        rankwise.ops.set_cpu_path(path)
        return step(tokens, 46, dtype, p)

    def timed() -> list:
        return [m for m in rankwise.ops.measured_paths() if (m.n_in, m.dropout) == (46, p > 0)]

    before = len(timed())
    expected = {path: on(path, 33) for path in ("micro-kernel", "ATen")}
    assert len(timed()) == before
    got = on("measured", 33)
    assert rankwise.ops.path(torch.empty(1)) == "cpu (measured)"
    for tokens in (33, 40, 64):  # of one kind
        on("measured", tokens)
    name = ", ".join(dict.fromkeys(str(t).removeprefix("torch.") for t in DTYPES[dtype]))
    kinds = {m.call: m for m in timed() if m.dtype == name}
    assert len(timed()) == before + 2 and set(kinds) == {"forward", "backward"}
    for kind in kinds.values():
        assert (kind.tokens, kind.n_out, kind.rank) == (64, 64, 4)
        assert kind.micro_kernel_ms > 0 and kind.aten_ms > 0
        faster = kind.micro_kernel_ms <= kind.aten_ms
        assert kind.chosen == ("micro-kernel" if faster else "ATen")
    assert_same_bits(got[0], expected[kinds["forward"].chosen][0], "y")
    if kinds["forward"].chosen == kinds["backward"].chosen:
        for mine, want in zip(got, expected[kinds["forward"].chosen], strict=True):
            assert_same_bits(mine, want, "a gradient")


def test_measured_is_the_default_where_results_must_be_deterministic():
    expected = step(20, 50)
    rankwise.ops.set_cpu_path("measured")
    torch.use_deterministic_algorithms(True)
    try:
        got = step(20, 50)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not [m for m in rankwise.ops.measured_paths() if m.n_in == 50]
    for mine, want in zip(got, expected, strict=True):
        assert_same_bits(mine, want, "under use_deterministic_algorithms")


def test_a_path_that_is_none():
    message = "set_cpu_path: name must be one of micro-kernel, ATen, measured, got 'fast'"
    with pytest.raises(ValueError, match=re.escape(message)):
        rankwise.ops.set_cpu_path("fast")
