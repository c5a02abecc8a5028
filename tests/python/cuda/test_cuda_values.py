# lora_linear on CUDA against the float64 oracle: the table of the CPU, and sizes of many tiles.
from dataclasses import replace

import pytest
import torch
from cuda_device import DEVICE, KERNEL_DTYPES
from samples import DTYPES, SAMPLES, Sample, arguments, subsets, tensors
from test_lora_linear_values import check, sampled
from tolerances import assert_same_bits

import rankwise

SIZES = [  # leading dimensions, in, out, (rank, capacity): several tiles, and tails in all sizes
    ((300,), 384, 320, (16, 16)),
    ((129,), 257, 130, (5, 16)),
    ((2, 65), 129, 383, (33, 64)),
    ((33,), 400, 72, (64, 64)),
    ((70,), 392, 136, (200, 256)),
    ((1,), 384, 384, (8, 8)),
    ((400,), 1, 1, (3, 3)),
    ((40,), 72, 40, (300, 300)),  # above the kernels' largest rank
]


def large() -> list[Sample]:
    found = []
    for i, (lead, n_in, n_out, rank) in enumerate(SIZES):
        for dtype in KERNEL_DTYPES:
            for dropout in (0.0, 0.1):
                sample = Sample(dtype=dtype, shape=(lead, n_in, n_out), rank=rank, dropout=dropout)
                found.append(sample)
                if i < 3:
                    found.append(replace(sample, layout="conv1d", operands="strided",
                                         stride="stepped", grad_output="transposed"))  # fmt: skip
                    found.append(replace(sample, gate="none", bias=False, operands="strided",
                                         stride="narrowed").sane())  # fmt: skip
    return found


@sampled(SAMPLES)
def test_the_table_of_the_cpu(sample):
    check(sample, DEVICE)


@sampled(large())
def test_sizes_of_many_tiles(sample):
    check(sample, DEVICE)


@sampled(
    [
        Sample(dtype=dtype, shape=((37,), 40, 24), rank=(5, 8), dropout=0.25, grads=grads)
        for dtype in ("float32", "bfloat16_float32")
        for grads in subsets()
    ]
)
def test_every_subset_of_gradients(sample):
    check(sample, DEVICE)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_inactive_directions_are_not_read(dtype):
    sample = Sample(dtype=dtype, shape=((70,), 96, 80), rank=(3, 8), dropout=0.1)
    tensor = tensors(sample, DEVICE)
    leaves = [tensor[name] for name in ("input", "lora_A", "lora_B", "lora_E")]

    def run() -> list[torch.Tensor]:
        torch.manual_seed(1)
        args, kwargs = arguments(sample, tensor)
        y = rankwise.ops.lora_linear(*args, **kwargs)
        return [y, *torch.autograd.grad(y, leaves, tensor["grad_output"])]

    clean = run()
    with torch.no_grad():
        tensor["lora_A"][3:] = float("nan")
        tensor["lora_B"][:, 3:] = float("nan")
        tensor["lora_E"][3:] = float("nan")
    for got, expected in zip(run(), clean, strict=True):
        assert_same_bits(got, expected, "a result with NaN behind the rank")


@pytest.mark.parametrize("dtype, digits", [(torch.bfloat16, 8), (torch.float16, 11)])
def test_the_base_product_is_rounded_with_all_that_is_added_to_it(dtype, digits):
    """1 + half a unit in the last place, from the bias, and a little more, from the adapter."""
    x, weight = torch.eye(32, 8).to(DEVICE, dtype), torch.eye(16, 8).to(DEVICE, dtype)
    bias = torch.full((16,), 2.0**-digits).to(DEVICE, dtype)
    A, B = torch.ones(1, 8).to(DEVICE, dtype), torch.full((16, 1), 2.0**-13).to(DEVICE, dtype)
    y = rankwise.ops.lora_linear(x, weight, bias, A, B, scaling=1.0)
    assert y.diagonal()[:8].tolist() == [1.0 + 2.0 ** (1 - digits)] * 8


@pytest.mark.parametrize("name", KERNEL_DTYPES)
def test_nan_and_inf_pass_through(name):
    dtype, adapter = DTYPES[name]
    x, weight = torch.ones(3, 4).to(DEVICE, dtype), torch.ones(5, 4).to(DEVICE, dtype)
    x[1, 2] = float("nan")
    x[2, 0] = float("inf")
    A, B = torch.ones(2, 4).to(DEVICE, adapter), torch.ones(5, 2).to(DEVICE, adapter)
    y = rankwise.ops.lora_linear(x, weight, None, A, B, scaling=1.0)
    assert y[0].isfinite().all() and y[1].isnan().all() and y[2].isinf().all()
    A[1, 3] = float("nan")
    assert rankwise.ops.lora_linear(x, weight, None, A, B, scaling=1.0).isnan().all()


@pytest.mark.parametrize("offset", [1, 2, 4, 5, 8])
def test_any_alignment_of_rows_and_pointers(offset):
    """Rows that start at any element, of matrices whose row length is no multiple of 16 bytes."""
    sample = Sample(dtype="bfloat16", shape=((50,), 72, 56), rank=(8, 8), dropout=0.1)
    plain = tensors(sample, DEVICE)

    def shifted(value: torch.Tensor) -> torch.Tensor:
        room = value.new_empty(value.numel() + offset * (value.shape[0] + 1))
        strides = (value.stride(0) + offset, 1) if value.dim() == 2 else (1,)
        moved = room.as_strided(value.shape, strides, offset)
        return moved.copy_(value.detach()).requires_grad_(value.requires_grad)

    def run(tensor: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        args, kwargs = arguments(sample, tensor)
        torch.manual_seed(1)
        y = rankwise.ops.lora_linear(*args, **kwargs)
        leaves = [tensor[name] for name in ("input", "lora_A", "lora_B", "lora_E")]
        return [y, *torch.autograd.grad(y, leaves, tensor["grad_output"])]

    moved = {name: shifted(value) for name, value in plain.items() if name != "lora_E"}
    results = zip(run(plain | moved), run(plain), strict=True)
    for got, expected in results:  # another alignment may mean another algorithm of the base
        torch.testing.assert_close(got, expected, rtol=2**-6, atol=2**-6)
