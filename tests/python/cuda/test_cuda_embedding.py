# lora_embedding on CUDA against the float64 oracle: the table of the CPU, sizes of many tiles,
# indices that occur often; and what it launches, records and refuses.
import subprocess
import sys

import pytest
import torch
from cuda_device import DEVICE, KERNEL_DTYPES, captured
from samples import DTYPES
from test_cuda_paths import launched
from test_lora_embedding import INDICES, RANKS, check, tensors
from tolerances import assert_same_bits

import rankwise

SIZES = [  # indices, distinct ones, rows of the table, columns, (rank, capacity)
    ((3, 100), 400, 400, 320, (16, 16)),
    ((129,), 57, 257, 130, (5, 16)),
    ((5000,), 3, 40, 72, (33, 64)),  # each more than a thousand times
    ((200, 41), 1, 9, 24, (8, 8)),
    ((700,), 50, 60, 136, (200, 256)),
    ((40,), 30, 30, 40, (300, 300)),  # above the kernels' largest rank
]


@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("rank, capacity", RANKS)
@pytest.mark.parametrize("shape", INDICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_table_of_the_cpu(dtype, shape, rank, capacity, gated, padding_idx):
    tensor = tensors(dtype, capacity, gated, device=DEVICE)
    check(INDICES[shape].to(DEVICE), tensor, rank, padding_idx)


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_sizes_of_many_tiles(dtype, size, index_dtype):
    shape, distinct, num, dim, (rank, capacity) = size
    torch.manual_seed(0)
    tensor = tensors(dtype, capacity, True, (num, dim), DEVICE)
    with torch.no_grad():
        tensor["lora_B"] /= rank**0.5
    indices = torch.randint(distinct, shape, device=DEVICE, dtype=index_dtype)
    check(indices, tensor, rank, padding_idx=2)


@pytest.mark.parametrize("table", [True, False])  # a strided one takes the composite form
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_strided_operands(dtype, table):
    tensor = tensors(dtype, 8, True, (50, 40), DEVICE)

    def apart(value: torch.Tensor) -> torch.Tensor:
        """The same values as every second row and column of a larger matrix, transposed."""
        room = value.new_empty(2 * value.shape[1], 2 * value.shape[0])
        return room.t()[::2, ::2].copy_(value.detach()).requires_grad_()

    indices = torch.randint(50, (60, 2), device=DEVICE)[:, 0]
    strided = {name: apart(value) for name, value in tensor.items() if table or name != "weight"}
    check(indices, tensor | strided, 5, None)


@pytest.mark.parametrize("offset", [1, 2, 4, 5, 8])
def test_any_alignment_of_the_tables_rows(offset):
    tensor = tensors("bfloat16", 8, False, (50, 72), DEVICE)
    room = torch.empty(50 * (72 + offset) + offset, device=DEVICE, dtype=torch.bfloat16)
    moved = room.as_strided((50, 72), (72 + offset, 1), offset).copy_(tensor["weight"].detach())
    indices = torch.randint(50, (70,), device=DEVICE)
    got = rankwise.ops.lora_embedding(indices, **tensor | {"weight": moved}, scaling=2.0)
    expected = rankwise.ops.lora_embedding(indices, **tensor, scaling=2.0)
    assert_same_bits(got, expected, "y of a table with rows apart")


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_inactive_directions_are_not_read(dtype):
    tensor = tensors(dtype, 8, True, (50, 40), DEVICE)
    indices = torch.randint(50, (70,), device=DEVICE)

    def run() -> list[torch.Tensor]:
        y = rankwise.ops.lora_embedding(indices, **tensor, scaling=2.0, rank=3)
        return [y, *torch.autograd.grad(y, list(tensor.values()), torch.cos(y.detach()))]

    clean = run()
    with torch.no_grad():
        tensor["lora_A"][3:] = float("nan")
        tensor["lora_B"][:, 3:] = float("nan")
        tensor["lora_E"][3:] = float("nan")
    for got, expected in zip(run(), clean, strict=True):
        assert_same_bits(got, expected, "a result with NaN behind the rank")


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_forward_is_the_kernels_alone(dtype):
    tensor = tensors(dtype, 8, True, (500, 256), DEVICE)
    indices = torch.randint(500, (300,), device=DEVICE)

    def run() -> None:
        with torch.no_grad():
            rankwise.ops.lora_embedding(indices, **tensor, scaling=2.0)

    run()
    names = [name for name in launched(run) if "at::native" in name or "rankwise" in name]
    assert sum("gather" in name for name in names) == sum("expand" in name for name in names) == 1
    # E's active part lies in one piece already: nothing is copied.
    assert len(names) == 2, names


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_a_graph_gives_the_bits_of_eager_calls(dtype):
    tensor = tensors(dtype, 8, True, (500, 96), DEVICE)
    factors = [tensor[name] for name in ("lora_A", "lora_B", "lora_E")]
    indices = torch.randint(500, (4000,), device=DEVICE)
    dy = torch.randn(4000, 96, device=DEVICE).to(tensor["weight"].dtype)

    def run() -> list[torch.Tensor]:
        y = rankwise.ops.lora_embedding(indices, **tensor, scaling=2.0, padding_idx=7)
        return [y, *torch.autograd.grad(y, factors, dy)]

    graph, results = captured(run)
    for _ in range(3):
        indices.random_(500)
        graph.replay()
        for got, expected in zip([r.clone() for r in results], run(), strict=True):
            assert_same_bits(got, expected, "in a replay")


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_no_indices(dtype, shape):
    tensor = tensors(dtype, 4, True, device=DEVICE)
    indices = torch.zeros(shape, device=DEVICE, dtype=torch.int64)
    y = rankwise.ops.lora_embedding(indices, **tensor, scaling=2.0)
    assert y.shape == (*shape, 7)
    for gradient in torch.autograd.grad(y, list(tensor.values()), torch.ones_like(y)):
        assert not gradient.any()


def test_indices_on_another_device_are_refused():
    tensor = tensors("float32", 4, False, device=DEVICE)
    with pytest.raises(RuntimeError, match="lora_embedding: indices must be on cuda:0.*got cpu"):
        rankwise.ops.lora_embedding(torch.tensor([1]), **tensor, scaling=1.0)


OUTSIDE = """
import sys, torch, rankwise
weight, A, B = torch.ones(5, 8), torch.ones(2, 5), torch.ones(8, 2)
indices = torch.tensor([0, int(sys.argv[1])])
rankwise.ops.lora_embedding(*(t.cuda() for t in (indices, weight, A, B)), scaling=1.0).cpu()
"""


@pytest.mark.parametrize("index", [-1, 5, 2**40])
def test_an_index_outside_of_the_table_is_an_error(index):
    """In a process of its own: a failed assertion leaves the device unusable for its process."""
    command = [sys.executable, "-c", OUTSIDE, str(index)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode != 0
    assert "an index lies outside of the table" in run.stderr
    assert "device-side assert" in run.stderr
