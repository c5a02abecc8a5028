# Dropout on CUDA: the masks of the CPU, and PyTorch's rules for seeds, generators and graphs.
import oracle
import pytest
import torch
from cuda_device import DEVICE, captured
from samples import DTYPES
from test_determinism import check_checkpointing
from test_dropout_mask import SEEDS, SIZES
from tolerances import assert_same_bits

import rankwise

EYE = torch.eye(64, device=DEVICE)


def dropped(p: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A layer whose output is its dropped input of ones, [32, 64]."""
    eye = EYE.to(dtype)
    x = torch.ones(32, 64, device=DEVICE, dtype=dtype)
    return rankwise.ops.lora_linear(x, 0 * eye, None, eye, eye, scaling=1.0, dropout_p=p)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, cols", SIZES)
def test_mask_is_the_cpus(rows, cols, dtype):
    for seed in SEEDS:
        for p in (2.0**-16, 0.1, 0.5, 1.0):
            key = torch.tensor([seed])
            expected = rankwise.ops.dropout_mask(key, rows, cols, p, dtype)
            got = rankwise.ops.dropout_mask(key.to(DEVICE), rows, cols, p, dtype)
            assert_same_bits(got.cpu(), expected, f"mask of seed {seed}, p {p}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_layer_applies_the_mask_of_its_seed(dtype):
    torch.manual_seed(3)
    y = dropped(0.25, dtype)
    torch.manual_seed(3)
    x, eye = torch.ones(32, 64, device=DEVICE, dtype=dtype), EYE.to(dtype)
    forward = torch.ops.rankwise._lora_linear_forward
    seed = forward(x, 0 * eye, None, eye, eye, None, 1.0, 0.25, 64)[2]
    assert seed.device.type == DEVICE
    mask = rankwise.ops.dropout_mask(seed.cpu(), 32, 64, 0.25).to(DEVICE)
    assert_same_bits(y, (mask * oracle.dropout_keep_scale(0.25)).to(dtype), "dropped ones")


def test_seeds_come_from_the_devices_generator_and_only_where_something_drops():
    cpu, state = torch.get_rng_state(), torch.cuda.get_rng_state()
    dropped(0.0)
    dropped(1e-6)  # rounds to none
    assert torch.equal(torch.cuda.get_rng_state(), state)
    first = dropped(0.5)
    assert not torch.equal(torch.cuda.get_rng_state(), state)
    assert torch.equal(torch.get_rng_state(), cpu)
    assert not torch.equal(first, dropped(0.5))
    torch.cuda.set_rng_state(state)
    assert_same_bits(dropped(0.5), first, "a restored state's mask")
    torch.cuda.manual_seed(9)
    again = dropped(0.5)
    torch.cuda.manual_seed(9)
    assert_same_bits(dropped(0.5), again, "a repeated seed's mask")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_the_same_mask(reentrant, dtype):
    check_checkpointing(reentrant, dtype, DEVICE)


def test_a_replayed_graph_draws_new_masks_as_eager_calls_would():
    graph, y = captured(lambda: dropped(0.5))
    torch.cuda.manual_seed(4)
    replays = []
    for _ in range(3):
        graph.replay()
        replays.append(y.clone())
    torch.cuda.manual_seed(4)
    for replay in replays:
        assert_same_bits(replay, dropped(0.5), "a replay's mask")
    assert not torch.equal(replays[0], replays[1]) and not torch.equal(replays[1], replays[2])
