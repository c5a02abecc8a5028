# How adapters start: distributions, scaling, rank 0, spare capacity, and options that are refused.
import math

import pytest
import torch
from layer_cases import IN, KINDS, OUT, ROWS, example, factors, make
from tolerances import assert_same_bits
from torch import nn

import rankwise as rw

WIDE, LONG = 400, 300  # large enough for moments within a few per cent


def big(kind=rw.nn.LoRALinear, **options):
    return kind(WIDE, LONG, **{"rank": 50, **options})


def test_kaiming_is_nn_linears_bound_and_spread():
    A = big().lora_A
    bound = 1 / math.sqrt(WIDE)
    assert A.abs().max() <= bound
    assert A.abs().max() > 0.99 * bound
    assert A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert abs(A.mean().item()) < 0.02 * bound
    assert not big().lora_B.any()


def test_gaussian_has_standard_deviation_one_over_rank():
    layer = big(init="gaussian")
    assert layer.lora_A.std().item() == pytest.approx(1 / 50, rel=0.03)
    assert abs(layer.lora_A.mean().item()) < 0.001
    assert not layer.lora_B.any()


def test_swapped_has_zero_A_and_gaussian_B():
    layer = big(init="swapped")
    assert not layer.lora_A.any()
    assert layer.lora_B.std().item() == pytest.approx(1 / 50, rel=0.03)


def test_adalora_starts_normal_with_zero_E():
    layer = big(rw.nn.AdaLoRALinear)
    assert layer.lora_A.std().item() == pytest.approx(0.02, rel=0.03)
    assert layer.lora_B.std().item() == pytest.approx(0.02, rel=0.03)
    assert layer.lora_E.shape == (50, 1) and not layer.lora_E.any()


def test_the_embedding_starts_as_in_the_papers_code():
    """loralib's and PEFT's Embedding: A zero, B standard normal."""
    layer = rw.nn.LoRAEmbedding(WIDE, LONG, rank=50)
    assert layer.lora_A.shape == (50, WIDE) and not layer.lora_A.any()
    assert layer.lora_B.shape == (LONG, 50)
    assert layer.lora_B.std().item() == pytest.approx(1.0, rel=0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_factors_start_with_the_same_spread(dtype):
    layer = big(dtype=dtype, adapter_dtype=dtype)
    assert layer.lora_A.dtype == dtype
    assert layer.lora_A.float().std().item() == pytest.approx(0.05 / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "swapped", None])
@pytest.mark.parametrize("kind", KINDS)
def test_the_update_is_zero_at_the_start(kind, init):
    layer = KINDS[kind](torch.float64, rank=3, init=init).train()
    x = example(layer)
    delta = layer.scaling * layer.lora_B @ layer.lora_A
    delta = delta if layer.lora_E is None else layer.lora_B @ (layer.lora_E * layer.lora_A)
    assert not delta.any()
    base = layer.weight if kind != "conv1d" else layer.weight.t()
    plain = nn.functional.embedding if kind == "embedding" else nn.functional.linear
    wanted = base[x] if kind == "embedding" else plain(x, base, layer.bias)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-14, atol=1e-14)


def test_a_new_adapter_differs_from_one_seed_to_the_next_and_repeats_with_it():
    first, second = (torch.manual_seed(s) and big().lora_A for s in (1, 2))
    torch.manual_seed(1)
    assert_same_bits(big().lora_A, first, "same seed")
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "options, scaling",
    [
        ({"rank": 8}, 2.0),
        ({"rank": 4, "alpha": 6}, 1.5),
        ({"rank": 4, "alpha": 6, "rslora": True}, 3.0),
        ({"rank": 3, "alpha": -1.0}, -1 / 3),
        ({"rank": 3, "alpha": 0.0}, 0.0),
        ({"rank": 4, "alpha": 8, "capacity": 16}, 2.0),
        ({"rank": 0}, 0.0),
        ({"rank": 0, "rslora": True}, 0.0),
    ],
)
def test_scaling(options, scaling):
    layer = rw.nn.LoRALinear(4, 4, **options)
    assert layer.scaling == pytest.approx(scaling, abs=0)
    assert layer.alpha == options.get("alpha", 16.0)


@pytest.mark.parametrize("kind", KINDS)
def test_rank_zero_is_the_base_with_empty_factors(kind):
    layer = KINDS[kind](torch.float64, rank=0)
    assert layer.rank == layer.capacity == 0
    x = example(layer)
    output = layer(x)
    output.sum().backward()
    for factor in factors(layer).values():
        assert 0 in factor.shape
        assert factor.grad is None or factor.grad.shape == factor.shape
    base = layer.weight.detach().clone()
    report = layer.merge()
    assert (report.changed, report.max_rounding_error) == (0, 0.0)
    torch.testing.assert_close(layer.eval()(x), output, rtol=1e-14, atol=1e-14)
    layer.unmerge()
    assert_same_bits(layer.weight, base, "base")


@pytest.mark.parametrize("kind", KINDS)
def test_capacity_beyond_the_rank_waits_as_zeros(kind):
    layer = KINDS[kind](torch.float64, rank=2, capacity=5, init="kaiming")
    assert (layer.rank, layer.capacity) == (2, 5)
    assert layer.lora_A.shape[0] == layer.lora_B.shape[1] == 5
    assert not layer.lora_A[2:].any() and not layer.lora_B[:, 2:].any()
    assert layer.lora_A[:2].any() or layer.lora_B[:, :2].any()
    layer(example(layer)).square().sum().backward()
    for name, factor in factors(layer).items():
        spare = factor.grad[:, 2:] if name == "lora_B" else factor.grad[2:]
        assert not spare.any()


@pytest.mark.parametrize("kind", KINDS)
def test_directions_behind_the_rank_take_no_part(kind):
    layer = make(kind, torch.float64, rank=2, capacity=5)
    x = example(layer)
    before = layer(x).detach().clone()
    with torch.no_grad():
        layer.lora_A[2:], layer.lora_B[:, 2:] = 1e6, 1e6
    assert_same_bits(layer(x).detach(), before, "output")
    layer.merge()
    torch.testing.assert_close(layer.eval()(x), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_float32_factors_over_a_sixteen_bit_base(kind, dtype):
    layer = make(kind, dtype, adapter_dtype=torch.float32)
    assert layer.weight.dtype == dtype
    assert {f.dtype for f in factors(layer).values()} == {torch.float32}
    output = layer(example(layer))
    assert output.dtype == dtype
    output.float().square().sum().backward()
    assert {f.grad.dtype for f in factors(layer).values()} == {torch.float32}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": -1}, r"rank must be an integer >= 0, got -1"),
        ({"rank": 2.0}, r"rank must be an integer >= 0, got 2\.0"),
        ({"rank": True}, r"rank must be an integer >= 0, got True"),
        ({"alpha": float("nan")}, r"alpha must be finite, got nan"),
        ({"alpha": float("inf")}, r"alpha must be finite, got inf"),
        ({"dropout": 1.5}, r"dropout must be in \[0, 1\], got 1\.5"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\], got -0\.1"),
        ({"dropout": float("nan")}, r"dropout must be in \[0, 1\], got nan"),
        ({"init": "zeros"}, r"init must be one of .*'kaiming'.*, got 'zeros'"),
        ({"capacity": 7}, r"capacity must be at least the rank 8, got 7"),
        ({"capacity": 8.5}, r"capacity must be .*, got 8\.5"),
        ({"alpha": "16"}, r"alpha must be .*, got '16'"),
        ({"dropout": None}, r"dropout must be .*, got None"),
        (
            {"adapter_dtype": torch.float16},
            r"adapter_dtype must be torch.float32 like the base's.*float16",
        ),
        (
            {"adapter_dtype": torch.int8},
            r"adapter_dtype must be torch.float32 like the base's.*int8",
        ),
    ],
)
def test_refused_options_are_named(options, message):
    with pytest.raises(ValueError, match=f"adapter: {message}"):
        rw.nn.LoRALinear(IN, OUT, **options)


def test_padding_stays_what_it_was_through_training():
    layer = make("embedding", torch.float64)
    with torch.no_grad():
        layer.lora_A.zero_()
    before = layer.weight[2].detach().clone()
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        (layer(torch.arange(ROWS)) - 1).square().sum().backward()
        optimizer.step()
    assert_same_bits(layer(torch.tensor([2]))[0].detach(), before, "the padding row")
    assert not torch.equal(layer(torch.tensor([3])), layer.weight[3:4])


def test_reset_parameters_restarts_base_and_adapter():
    """As for nn.Linear after to_empty(): every own parameter gets its first distribution again."""
    layer = rw.nn.LoRALinear(WIDE, LONG, rank=50, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(7.0)
    layer.reset_parameters()
    bound = 1 / math.sqrt(WIDE)
    for parameter in (layer.weight, layer.bias, layer.lora_A):
        assert 0.98 * bound < parameter.abs().max() <= bound
    assert not layer.lora_B.any()
