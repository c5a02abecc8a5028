# The product with the LoRA term in its sums, at the least sizes that take it, on devices of sm_90.
import pytest
import torch
from cuda_device import DEVICE, captured
from tolerances import assert_same_bits

from rankwise.ops import lora_linear, path

TOKENS, WIDTH = 8192, 1024  # 256 tiles
SIZES = {"before": (TOKENS, WIDTH), "beside": (2048, 4096)}  # where up to rank 16 reads x


def operands(dtype, rank, tokens=TOKENS, gate=False, factors=None, width=WIDTH):
    generator = torch.Generator(DEVICE).manual_seed(rank)

    def normal(*shape, scale=1.0, of=dtype):
        values = torch.randn(*shape, device=DEVICE, generator=generator) * scale
        return values.to(of).requires_grad_()

    own = factors or dtype
    x, A = normal(tokens, width), normal(rank, width, scale=0.03, of=own)
    B, W, bias = normal(width, rank, of=own), normal(width, width, scale=0.03), normal(width)
    E = normal(rank, 1, of=own) if gate else None
    return x, W, bias, A, B, E


def serves(dtype, rank=16, tokens=TOKENS) -> bool:
    like = torch.empty(0, dtype=dtype, device=DEVICE)
    return path(like, (tokens, WIDTH, WIDTH, rank)) == "cuda (sm_90a)"


def needs_it():
    if not serves(torch.bfloat16):
        pytest.skip("this device or its number of multiprocessors takes the other product")


def results(tensors, dropout=0.0):
    x, W, bias, A, B, E = tensors
    y = lora_linear(x, W, bias, A, B, E, scaling=0.75, dropout_p=dropout)
    leaves = [t for t in (x, A, B) if t.requires_grad]
    return (y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y)))


def expected(tensors):
    x, W, bias, A, B, E = (None if t is None else t.detach().double() for t in tensors)
    gate = 1.0 if E is None else E.t()
    dy = torch.ones(x.shape[0], W.shape[0], dtype=torch.float64, device=DEVICE)
    hidden = x @ A.t()
    dh = 0.75 * (dy @ B) * gate
    y = x @ W.t() + bias + 0.75 * (hidden * gate) @ B.t()
    return y, dy @ W + dh @ A, dh.t() @ x, 0.75 * dy.t() @ (hidden * gate)


def launched(action) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as run:
        action()
        torch.cuda.synchronize()
    return [e.name for e in run.events()]


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("rank", [1, 12, 16, 64, 250])
@pytest.mark.parametrize("where", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values(dtype, where, rank, gate):
    needs_it()
    tokens, width = SIZES[where]
    tensors = operands(dtype, rank, tokens, gate, width=width)
    step = 2**-8 if dtype is torch.bfloat16 else 2**-11
    for got, want in zip(results(tensors), expected(tensors), strict=True):
        error = (got.double() - want).norm() / want.norm()
        assert error <= step, (got.shape, error)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("rank", [1, 16, 85])
@pytest.mark.parametrize("where", SIZES)
def test_float32_factors_over_bfloat16(where, rank, gate):
    """y and dx are rounded once; gradients of factors are float32's."""
    needs_it()
    tokens, width = SIZES[where]
    tensors = operands(torch.bfloat16, rank, tokens, gate, torch.float32, width)
    for got, want in zip(results(tensors), expected(tensors), strict=True):
        step = 2**-8 if got.dtype is torch.bfloat16 else 2**-12
        error = (got.double() - want).norm() / want.norm()
        assert error <= step, (got.shape, error)


@pytest.mark.parametrize("where", SIZES)
def test_rows_that_fill_no_tile(where):
    needs_it()
    tokens, width = SIZES[where]
    tensors = operands(torch.bfloat16, 16, tokens - 57, width=width)
    got, want = results(tensors), expected(tensors)
    for one, other in zip(got, want, strict=True):
        assert (one.double() - other).norm() <= 2**-8 * other.norm()


@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_which_kernels_run(dropout, factors):
    needs_it()
    tensors = operands(torch.bfloat16, 16, factors=factors)
    results(tensors, dropout)
    names = launched(lambda: results(tensors, dropout))
    passes = ("row_products", "output_products", "column_products")
    assert [sum(p in name for name in names) for p in passes] == [1, 1, 1], names
    assert sum("linear_product" in name for name in names) == 2, names
    assert sum("finish" in name for name in names) == 3, names
    assert not any("expand" in name or "split" in name for name in names), names


# Passes beside a product go where it leaves multiprocessors idle.
@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32])
def test_which_kernels_run_beside_a_product(factors):
    needs_it()
    tokens, width = SIZES["beside"]
    tensors = operands(torch.bfloat16, 16, tokens, factors=factors, width=width)
    results(tensors)
    names = launched(lambda: results(tensors))
    assert sum("linear_product" in name for name in names) == 2, names
    assert sum("output_products" in name for name in names) == 1, names
    assert sum("finish" in name for name in names) == 2, names
    assert sum("cut_factor" in name for name in names) == (factors is torch.float32), names
    assert not any("row_products" in name or "column_products" in name for name in names), names


@pytest.mark.parametrize("where", SIZES)
def test_the_same_bits_in_every_run_and_in_graphs(where):
    needs_it()
    tokens, width = SIZES[where]
    tensors = operands(torch.bfloat16, 12, tokens, width=width)
    first = results(tensors)
    for _ in range(20):
        for one, other in zip(results(tensors), first, strict=True):
            assert_same_bits(one, other, str(one.shape))
    graph, replayed = captured(lambda: results(tensors))
    for _ in range(3):
        graph.replay()
        for one, other in zip(replayed, first, strict=True):
            assert_same_bits(one, other, str(one.shape))


def test_other_layers_take_the_other_product():
    for dtype, rank, tokens in ((torch.float32, 16, TOKENS), (torch.bfloat16, 0, TOKENS),
                                (torch.bfloat16, 16, 1)):  # fmt: skip
        like = torch.empty(0, dtype=dtype, device=DEVICE)
        assert path(like, (tokens, WIDTH, WIDTH, rank)) == "cuda (cuBLASLt)"
