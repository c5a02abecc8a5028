# The dropout mask against the oracle's, and what seeds and torch's generator have to do with it.
import numpy as np
import oracle
import pytest
import torch

import rankwise

SEEDS = [0, 1, -1, 2**31, 2**32 + 5, -(2**63), 2**63 - 1, 0x0123456789ABCDEF]
SIZES = [(1, 1), (1, 8), (3, 5), (7, 13), (64, 33), (0, 4), (4, 0), (1, 4099), (513, 130)]


def mask(seed: int, rows: int, cols: int, p: float, dtype: torch.dtype = torch.float32):
    return rankwise.ops.dropout_mask(torch.tensor([seed]), rows, cols, p, dtype=dtype)


@pytest.mark.parametrize("rows, cols", SIZES)
@pytest.mark.parametrize("seed", SEEDS)
def test_mask_is_the_oracles(seed, rows, cols):
    for p in (2.0**-16, 0.05, 0.1, 1 / 3, 0.5, 0.9, 1.0):
        got = mask(seed, rows, cols, p)
        np.testing.assert_array_equal(got.numpy(), oracle.dropout_mask(seed, rows, cols, p))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_mask_in_every_dtype(dtype):
    got = mask(5, 9, 21, 0.3, dtype)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.double().numpy(), oracle.dropout_mask(5, 9, 21, 0.3))


def test_element_depends_on_its_index_alone():
    assert torch.equal(mask(5, 12, 10, 0.3), mask(5, 10, 12, 0.3).reshape(12, 10))
    assert torch.equal(mask(5, 12, 10, 0.3)[:3], mask(5, 3, 10, 0.3))


def test_share_of_dropped_elements():
    for p in (0.1, 0.5):
        dropped = 1 - mask(17, 1000, 1000, p).mean().item()
        assert abs(dropped - p) < 5 * (p * (1 - p) / 1e6) ** 0.5 + 2.0**-17


def layer(p: float) -> torch.Tensor:
    """A layer whose output is its dropped input."""
    eye = torch.eye(16)
    return rankwise.ops.lora_linear(
        torch.ones(32, 16), torch.zeros(16, 16), None, eye, eye, scaling=1.0, dropout_p=p
    )


def test_the_layer_applies_the_mask_of_its_seed():
    torch.manual_seed(3)
    y = layer(0.25)
    torch.manual_seed(3)
    seed = torch.ops.rankwise._lora_linear_forward(
        torch.ones(32, 16),
        torch.zeros(16, 16),
        None,
        torch.eye(16),
        torch.eye(16),
        None,
        1.0,
        0.25,
        16,
    )[2]
    assert torch.equal(y, mask(seed.item(), 32, 16, 0.25) * oracle.dropout_keep_scale(0.25))


def test_dropout_draws_from_torchs_generator_and_only_when_it_drops():
    state = torch.get_rng_state()
    layer(0.0)
    layer(1e-6)  # rounds to none
    assert torch.equal(torch.get_rng_state(), state)
    first = layer(0.5)
    assert not torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, layer(0.5))
    torch.set_rng_state(state)
    assert torch.equal(first, layer(0.5))


def test_the_seed_is_what_torch_randint_draws():
    torch.manual_seed(4)
    first = layer(0.5)
    following = torch.rand(3)
    torch.manual_seed(4)
    seed = torch.randint(2**63 - 1, (1,)).item()
    assert torch.equal(first, mask(seed, 32, 16, 0.5) * oracle.dropout_keep_scale(0.5))
    assert torch.equal(torch.rand(3), following)


def test_base_is_not_dropped():
    x, weight = torch.randn(8, 16), torch.randn(12, 16)
    y = rankwise.ops.lora_linear(
        x, weight, None, torch.randn(4, 16), torch.randn(12, 4), scaling=1.0, dropout_p=1.0
    )
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight))
