# The same bits in 20 repeats and with any number of threads; the same mask under checkpointing.
import contextlib
import io
import os
import subprocess
import sys

import pytest
import torch
from samples import DTYPES
from tolerances import assert_same_bits
from torch.utils.checkpoint import checkpoint

import rankwise

NAMES = ("x", "weight", "bias", "lora_A", "lora_B", "lora_E")
SMALL = [(1, 768, 768, 8), (7, 384, 384, 16), (64, 100, 36, 3)]  # tokens, in, out, rank
# Enough work for several threads; of 1,000 tokens and 9 or 3 panels some are cut for them.
MANY = [(2048, 768, 768, 16), (512, 3072, 768, 16), (1000, 576, 192, 8)]
LARGE = {
    "float64": [(512, 768, 768, 8)],
    "float32": MANY,
    "bfloat16": MANY,
    "float16": [(512, 768, 768, 8)],
    "bfloat16_float32": MANY,
    "float16_float32": [(512, 768, 768, 8)],
}
CASES = [(dtype, shape) for dtype in DTYPES for shape in [*SMALL, *LARGE[dtype]]]
REPEATS = 20


def tensors(
    dtype: str, tokens: int, n_in: int, n_out: int, rank: int, device: str = "cpu"
) -> list[torch.Tensor]:
    base, adapter = DTYPES[dtype]
    torch.manual_seed(1)
    values = [
        torch.randn(tokens, n_in).to(base),
        (torch.randn(n_out, n_in) * n_in**-0.5).to(base),
        torch.randn(n_out).to(base),
        (torch.randn(rank, n_in) * n_in**-0.5).to(adapter),
        torch.randn(n_out, rank).to(adapter),
        torch.randn(rank, 1).to(adapter),
    ]
    return [value.to(device).requires_grad_() for value in values]


def step(tensor: list[torch.Tensor], p: float) -> list[torch.Tensor]:
    torch.manual_seed(2)
    y = rankwise.ops.lora_linear(*tensor, scaling=2.0, dropout_p=p)
    return [y, *torch.autograd.grad(y, tensor, torch.cos(y.detach()))]


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype, shape", CASES)
def test_same_bits(dtype, shape, p):
    tensor = tensors(dtype, *shape)
    torch.set_num_threads(2)
    first = step(tensor, p)
    for threads, times in ((2, REPEATS - 1), (1, 2), (3, 1), (7, 1), (2, 1)):
        torch.set_num_threads(threads)
        for _ in range(times):
            for name, got, expected in zip(("y", *NAMES), step(tensor, p), first, strict=True):
                assert_same_bits(got, expected, f"{name} with {threads} threads")


DIGEST = """
import hashlib, test_determinism as here
for dtype in ("float32", "bfloat16"):
    for shape in here.SMALL:
        for result in here.step(here.tensors(dtype, *shape), 0.1):
            print(hashlib.sha256(result.detach().double().numpy().tobytes()).hexdigest())
"""


def test_same_bits_in_processes_with_other_thread_settings():
    """torch.set_num_threads changes more of MKL's state than OMP_NUM_THREADS does."""
    printed = []
    for setting in ({}, {"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "3"}):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | setting
        run = [sys.executable, "-c", DIGEST]
        printed.append(subprocess.run(run, env=environment, check=True, capture_output=True).stdout)
    torch.set_num_threads(2)
    with contextlib.redirect_stdout(io.StringIO()) as here:
        exec(DIGEST)
    assert len(printed[0].split()) == 42
    assert {text.decode() for text in printed} == {here.getvalue()}


def test_mask_is_the_same_for_every_thread_count():
    seed = torch.tensor([77])
    masks = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        masks.append(rankwise.ops.dropout_mask(seed, 999, 1003, 0.1))
    assert torch.equal(*masks)


def dropped(x: torch.Tensor) -> torch.Tensor:
    """The dropped x itself, through factors that are identities."""
    eye = torch.eye(x.shape[-1], dtype=x.dtype)
    torch.manual_seed(4)
    return rankwise.ops.lora_linear(x, 0 * eye, None, eye, eye, scaling=1.0, dropout_p=0.3)


@pytest.mark.parametrize("threads", [1, 2])
def test_mask_in_the_layer_does_not_depend_on_strides_or_threads(threads):
    torch.set_num_threads(2)
    expected = dropped(torch.ones(300, 72))
    torch.set_num_threads(threads)
    for x in (
        torch.ones(72, 300).t(),
        torch.ones(300, 144)[:, ::2],
        torch.ones(1).expand(300, 72),
        torch.ones(600, 72)[::2],
        torch.ones(300, 90)[:, 7:79],
        torch.ones(10, 30, 72).view(300, 72),
    ):
        assert_same_bits(dropped(x), expected, f"mask for strides {x.stride()}")
    assert torch.equal(dropped(torch.ones(3, 10, 10, 72)).view(300, 72), expected)


def two_layers(x: torch.Tensor, first: list[torch.Tensor], second: list[torch.Tensor]):
    hidden = rankwise.ops.lora_linear(x, *first, scaling=2.0, dropout_p=0.3)
    return rankwise.ops.lora_linear(torch.tanh(hidden), *second, scaling=0.5, dropout_p=0.1)


def check_checkpointing(reentrant: bool, dtype: str, device: str = "cpu") -> None:
    x, *first = tensors(dtype, 13, 24, 24, 4, device)
    _, *second = tensors(dtype, 13, 24, 24, 4, device)
    leaves = [x, *first, *second]

    def gradients(run):
        for leaf in leaves:
            leaf.grad = None
        torch.manual_seed(6)
        y = run(x)
        torch.rand(3, device=device)  # moves the generator between forward and recomputation
        y.backward(torch.cos(y.detach()))
        return [y, *(leaf.grad for leaf in leaves)]

    plain = gradients(lambda x: two_layers(x, first, second))
    again = gradients(lambda x: checkpoint(two_layers, x, first, second, use_reentrant=reentrant))
    names = ["y", "x", *(f"{n} of layer {i}" for i in (1, 2) for n in NAMES[1:])]
    for name, got, expected in zip(names, again, plain, strict=True):
        assert_same_bits(got, expected, f"{name} with checkpointing")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_the_same_mask(reentrant, dtype):
    check_checkpointing(reentrant, dtype)
