# The merged weight is the exact sum rounded once, and the MergeReport says so with right numbers.
import numpy as np
import pytest
import torch
from layer_cases import DTYPES, FLOATS, KINDS, assert_nearest, exact_weight, factors, make, nearest
from tolerances import assert_same_bits

import rankwise as rw

CASES = [(kind, *dtypes) for kind in KINDS for dtypes in DTYPES]


@pytest.mark.parametrize("kind, dtype, adapter_dtype", CASES)
def test_every_bit_is_that_of_the_nearest_number(kind, dtype, adapter_dtype):
    """Factors are multiples of 1/8, so the float64 sum is exact before the one rounding."""
    layer = make(kind, dtype, adapter_dtype=adapter_dtype)
    exact = exact_weight(layer, layer.weight)
    layer.merge()
    assert_nearest(layer.weight, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("above", [True, False])
@pytest.mark.parametrize("base", [1.0, -1.0, 1.5, 96.0])
def test_sums_close_to_a_midpoint_are_not_rounded_twice(dtype, above, base):
    """A sum a little beside the middle of two numbers: through float32 it would become a tie."""
    half = 2.0 ** (np.frexp(base)[1] - (9 if dtype == torch.bfloat16 else 12))
    neighbour = base + np.sign(base) * 2 * half
    layer = rw.nn.LoRALinear(
        8, 8, dtype=dtype, rank=1, alpha=1.0, adapter_dtype=torch.float32, bias=False
    )
    odd = torch.arange(8) % 2 == 1  # on odd rows the tie would go the other way
    start = torch.where(odd, neighbour, base).double()
    away = np.sign(base) * half * (1 + (1 if above else -1) * 2.0**-20)
    with torch.no_grad():
        layer.weight.copy_(start[:, None].expand(8, 8))
        layer.lora_A.fill_(1.0)
        layer.lora_B.fill_(away)
    exact = exact_weight(layer, layer.weight)
    assert not torch.equal(exact, layer.weight.double())
    layer.merge()
    assert_nearest(layer.weight, exact)


@pytest.mark.parametrize("dtype", FLOATS)
def test_any_factors_are_within_half_a_unit_in_the_last_place(dtype):
    """Against 80-bit sums, with factors whose products are not exact."""
    layer = make("adalora", dtype)
    with torch.no_grad():
        for factor in factors(layer).values():
            factor.normal_()
    A, B, E, W = (
        t.detach().double().numpy().astype(np.longdouble)
        for t in (layer.lora_A, layer.lora_B, layer.lora_E, layer.weight)
    )
    exact = W + np.longdouble(layer.scaling) * (B @ (E * A))
    layer.merge()
    merged = layer.weight.double().numpy()
    spacing = torch.finfo(dtype).eps * 2.0 ** (np.frexp(merged)[1] - 1)
    error = np.abs(merged - exact) / spacing
    # In float64 the sum itself has a few roundings of terms that may be larger than the result.
    assert error.max() <= (40 if dtype == torch.float64 else 0.5 + 1e-7)


@pytest.mark.parametrize("kind, dtype, adapter_dtype", CASES)
def test_the_reports_numbers(kind, dtype, adapter_dtype):
    layer = make(kind, dtype, adapter_dtype=adapter_dtype)
    with torch.no_grad():
        layer.lora_B[: layer.lora_B.shape[0] // 2] = 0  # half of the weights do not change
    base, exact = layer.weight.detach().clone(), exact_weight(layer, layer.weight)
    rounded = nearest(exact, dtype)
    report = layer.merge()
    assert report.total == base.numel()
    assert report.changed == int((rounded != base).sum()) > 0
    assert report.changed <= base.numel() // 2
    assert report.max_rounding_error == (rounded.double() - exact).abs().max().item()
    assert type(report.max_rounding_error) is float
    assert {type(report.changed), type(report.total)} == {int}


def test_the_report_reads_as_a_sentence():
    report = rw.MergeReport(max_rounding_error=0.00123, changed=1, total=8)
    assert str(report) == "12.5 % of weights changed, rounding error at most 0.0012"


def test_an_update_below_half_a_unit_changes_nothing_and_is_reported():
    """What users of bfloat16 lose without a word elsewhere."""
    layer = make("linear", torch.bfloat16)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.lora_A.fill_(1.0)
        layer.lora_B.fill_(2.0**-13)  # the update is 8 * 2**-13, a quarter of the spacing at 1
    report = layer.merge()
    assert report.changed == 0
    assert report.max_rounding_error == 2.0**-10
    assert (layer.weight == 1).all()


def test_the_weights_given_to_merge_are_large_enough_to_need_blocks():
    """More rows than one block of scratch memory holds."""
    layer = rw.nn.LoRALinear(700, 900, dtype=torch.bfloat16, rank=2, alpha=2.0)
    with torch.no_grad():
        layer.lora_A.copy_(torch.randint(-8, 9, layer.lora_A.shape) / 8)
        layer.lora_B.copy_(torch.randint(-8, 9, layer.lora_B.shape) / 8)
    exact = exact_weight(layer, layer.weight)
    rounded = nearest(exact, torch.bfloat16)
    report = layer.merge()
    assert_same_bits(layer.weight, rounded, "merged weight")
    assert report.max_rounding_error == (rounded.double() - exact).abs().max().item()
