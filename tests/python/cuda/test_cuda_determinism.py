# The same bits in 100 repeats, on other streams, in graphs and after calls of other shapes.
import pytest
import torch
from cuda_device import DEVICE, KERNEL_DTYPES, captured
from test_determinism import NAMES, step, tensors
from tolerances import assert_same_bits

import rankwise

REPEATS = 100
SHAPES = [(1, 768, 768, 8), (64, 100, 36, 3), (512, 4096, 1024, 16), (2048, 768, 3072, 64)]


def assert_same(got: list[torch.Tensor], expected: list[torch.Tensor], what: str) -> None:
    for name, a, b in zip(("y", *NAMES), got, expected, strict=True):
        assert_same_bits(a, b, f"{name} {what}")


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_same_bits(dtype, shape, p):
    tensor = tensors(dtype, *shape, DEVICE)
    first = step(tensor, p)
    for i in range(REPEATS):
        assert_same(step(tensor, p), first, f"in repeat {i}")


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_same_bits_after_calls_of_other_shapes(dtype):
    shape = (130, 256, 192, 8)
    tensor = tensors(dtype, *shape, DEVICE)
    first = step(tensor, 0.1)
    for tokens in (1, 128, 129, 131, 256):
        step(tensors(dtype, tokens, *shape[1:], DEVICE), 0.1)
    assert_same(step(tensor, 0.1), first, "after other shapes")


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_work_goes_to_the_current_stream(dtype):
    """The input appears on the stream only after a long wait there."""
    tensor = tensors(dtype, 512, 768, 768, 16, DEVICE)
    expected = step(tensor, 0.1)
    value = tensor[0].detach().clone()
    with torch.no_grad():
        tensor[0].zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        with torch.no_grad():
            tensor[0].copy_(value)
        got = step(tensor, 0.1)
    stream.synchronize()
    assert_same(got, expected, "on another stream")


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_a_graph_gives_the_bits_of_eager_calls(dtype):
    tensor = tensors(dtype, 256, 384, 512, 16, DEVICE)
    dy = torch.randn(256, 512, device=DEVICE).to(tensor[0].dtype)

    def run() -> list[torch.Tensor]:
        y = rankwise.ops.lora_linear(*tensor, scaling=2.0)
        return [y, *torch.autograd.grad(y, tensor, dy)]

    graph, results = captured(run)
    for _ in range(3):
        with torch.no_grad():
            tensor[0].normal_()
        graph.replay()
        assert_same([r.clone() for r in results], run(), "in a replay")


def test_embedding_has_the_same_bits():
    weight = torch.randn(1000, 96, device=DEVICE, requires_grad=True)
    A = torch.randn(8, 1000, device=DEVICE, requires_grad=True)
    B = torch.randn(96, 8, device=DEVICE, requires_grad=True)
    indices = torch.randint(50, (5000,), device=DEVICE)  # each a hundred times

    def run() -> list[torch.Tensor]:
        y = rankwise.ops.lora_embedding(indices, weight, A, B, scaling=2.0)
        return [y, *torch.autograd.grad(y, [weight, A, B], torch.cos(y.detach()))]

    first = run()
    for _ in range(REPEATS):
        for got, expected in zip(run(), first, strict=True):
            assert_same_bits(got, expected, "lora_embedding")
