# merged_weight: round(W0 + scaling * B diag(E) A) exactly once, and what it reports about it.
import numpy as np
import pytest
import torch
from samples import DTYPES
from tolerances import assert_same_bits

import rankwise

BITS = {torch.float64: torch.int64, torch.float32: torch.int32}


def exact_sum(weight, lora_A, lora_B, lora_E=None, *, scaling, rank=None) -> torch.Tensor:
    A, B = lora_A[:rank].double(), lora_B[:, :rank].double()
    gate = 1.0 if lora_E is None else lora_E[:rank].double()
    return weight.double() + scaling * (B @ (gate * A))


def nearest(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 values to `dtype`, to the nearest, ties to even, not by way of float32."""
    bits = BITS.get(dtype, torch.int16)
    guess = values.to(dtype)
    around = [guess.view(bits) + step for step in (-1, 0, 1)]
    candidates = torch.stack([pattern.view(dtype) for pattern in around])
    distance = (candidates.double() - values).abs().nan_to_num(nan=float("inf"))
    odd = torch.stack([pattern & 1 for pattern in around]).double()
    best = (distance == distance.min(0).values) * (2 - odd)
    return candidates.gather(0, best.argmax(0, keepdim=True))[0]


def tensors(dtype: str, n_out: int, n_in: int, rank: int, scale: float = 1.0) -> dict:
    base, adapter = DTYPES[dtype]
    return {
        "weight": torch.randn(n_out, n_in).to(base),
        "lora_A": torch.randn(rank, n_in).to(adapter),
        "lora_B": (scale * torch.randn(n_out, rank)).to(adapter),
        "lora_E": torch.randn(rank, 1).to(adapter),
    }


@pytest.mark.parametrize("n_out, n_in, rank", [(7, 13, 3), (600, 520, 8), (5, 4, 0)], ids=str)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_rounding_of_the_exact_sum(dtype, gated, n_out, n_in, rank):
    tensor = tensors(dtype, n_out, n_in, rank, scale=0.01)
    if not gated:
        tensor["lora_E"] = None
    merged, error, changed = rankwise.ops.merged_weight(**tensor, scaling=0.7)
    exact = exact_sum(**tensor, scaling=0.7)
    if dtype == "float64":  # here the sum itself is rounded, in some order
        torch.testing.assert_close(merged, exact, rtol=1e-14, atol=1e-14)
    else:
        assert_same_bits(merged, nearest(exact, merged.dtype), "merged")
        assert error.item() == pytest.approx(
            (merged.double() - exact).abs().max().item(), abs=1e-12
        )
    assert error.dtype == torch.float64 and error.shape == ()
    assert changed.dtype == torch.int64
    assert changed.item() == int((merged != tensor["weight"]).sum())


@pytest.mark.parametrize("base, ulp", [(torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)])
def test_a_sum_just_past_the_middle_is_not_rounded_twice(base, ulp):
    """By way of float32 the sum would land on the middle and fall to the even neighbour, 1."""
    tiny = 2.0**-20
    merged, error, changed = rankwise.ops.merged_weight(
        torch.ones(1, 1, dtype=base),
        torch.tensor([[ulp / 2], [tiny]]),
        torch.tensor([[1.0, tiny]]),
        scaling=1.0,
    )
    assert merged.item() == 1 + ulp
    assert error.item() == ulp / 2 - tiny**2 and changed.item() == 1


def test_only_the_active_directions_count():
    tensor = tensors("float32", 6, 5, 4)
    merged = rankwise.ops.merged_weight(**tensor, scaling=2.0, rank=2)[0]
    part = tensor | {
        "lora_A": tensor["lora_A"][:2],
        "lora_B": tensor["lora_B"][:, :2],
        "lora_E": tensor["lora_E"][:2],
    }
    assert_same_bits(merged, rankwise.ops.merged_weight(**part, scaling=2.0)[0], "merged")


def test_strides_of_a_transposed_weight_are_kept_and_inputs_untouched():
    tensor = tensors("float32", 6, 5, 4)
    tensor["weight"] = tensor["weight"].t().contiguous().t()
    before = {name: value.clone() for name, value in tensor.items()}
    merged = rankwise.ops.merged_weight(**tensor, scaling=2.0)[0]
    assert merged.stride() == tensor["weight"].stride() == (1, 6)
    assert merged.data_ptr() != tensor["weight"].data_ptr()
    for name, value in before.items():
        assert_same_bits(tensor[name], value, name)


def test_no_update_changes_nothing():
    tensor = tensors("bfloat16", 6, 5, 4, scale=0.0)
    merged, error, changed = rankwise.ops.merged_weight(**tensor, scaling=2.0)
    assert_same_bits(merged, tensor["weight"], "merged")
    assert error.item() == 0 and changed.item() == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_show_in_the_report(bad):
    tensor = tensors("float32", 6, 5, 4)
    tensor["lora_A"][1, 2] = bad
    error = rankwise.ops.merged_weight(**tensor, scaling=2.0)[1]
    assert not np.isfinite(error.item())


def test_overflow_of_the_weights_dtype_shows_in_the_report():
    error = rankwise.ops.merged_weight(
        torch.full((1, 1), 6e4, dtype=torch.float16),
        torch.full((1, 1), 6e4),
        torch.ones(1, 1),
        scaling=1.0,
    )[1]
    assert not np.isfinite(error.item())


WRONG = [  # argument, its wrong value, wanted, got
    ("weight", torch.zeros(6), r"\[out_features, in_features\]", r"\[6\]"),
    ("lora_A", torch.zeros(4, 6), r"\[rank, 5\]", r"\[4, 6\]"),
    ("lora_A", torch.zeros(5), r"\[rank, 5\]", r"\[5\]"),
    ("lora_B", torch.zeros(5, 4), r"\[6, 4\]", r"\[5, 4\]"),
    ("lora_E", torch.zeros(1, 4), r"\[4, 1\]", r"\[1, 4\]"),
    ("lora_B", torch.zeros(6, 4, dtype=torch.float64), "float32", "float64"),
    ("rank", -1, r"\[0, 4\]", "-1"),
    ("scaling", float("inf"), "finite", "inf"),
]


@pytest.mark.parametrize("argument, value, wanted, got", WRONG)
def test_refusals(argument, value, wanted, got):
    arguments = {**tensors("float32", 6, 5, 4), "scaling": 1.0, argument: value}
    with pytest.raises(RuntimeError, match=rf"merged_weight: {argument} must .*{wanted}.*{got}"):
        rankwise.ops.merged_weight(**arguments)
