# lora_linear against the float64 oracle: output, hidden and every gradient asked for.
import pytest
import torch
from expected import assert_gradients, assert_output, exact, problem, raw_forward
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import dropout_threshold, hidden
from samples import NAMES, SAMPLES, Sample, arguments, tensors
from tolerances import assert_close, assert_same_bits

import rankwise

SEED = 11


def sampled(samples: list[Sample]):
    return pytest.mark.parametrize("sample", samples, ids=[s.id for s in samples])


def check(sample: Sample, device: str = "cpu") -> None:
    tensor = tensors(sample, device)
    args, kwargs = arguments(sample, tensor)
    torch.manual_seed(SEED)
    output, found_hidden, seed = raw_forward(sample, tensor)
    torch.manual_seed(SEED)
    y = rankwise.ops.lora_linear(*args, **kwargs)

    lead, _, n_out = sample.shape
    assert y.shape == (*lead, n_out) and y.dtype == tensor["input"].dtype
    assert y.requires_grad == bool(sample.grads)
    assert_same_bits(output, y, "output of the inner op and of the public one")
    found = problem(
        tensor, scaling=sample.scaling, dropout_p=sample.dropout, rank=sample.rank[0], seed=seed
    )
    assert_output(y, found)
    assert found_hidden.dtype == tensor["lora_A"].dtype
    assert_close(found_hidden, hidden(found), hidden(found.absolute()), "hidden")
    assert seed.dtype == torch.int64
    assert seed.shape == ((1,) if dropout_threshold(sample.dropout) else (0,))

    before = {name: t.detach().clone() for name, t in tensor.items()}
    wanted = [NAMES[name] for name in sample.grads]
    if wanted:
        gradients = torch.autograd.grad(y, [tensor[n] for n in wanted], tensor["grad_output"])
        for name, gradient in zip(wanted, gradients, strict=True):
            assert gradient.dtype == tensor[name].dtype, f"gradient of {name}"
        assert_gradients(
            dict(zip(sample.grads, gradients, strict=True)), tensor["grad_output"], found
        )
    for name, value in before.items():
        assert_same_bits(tensor[name], value, f"{name} after forward and backward")


@sampled(SAMPLES)
def test_output_and_gradients_match_the_oracle(sample):
    check(sample)


@sampled([s for s in SAMPLES if s.bias and s.gate != "none"][::4])
def test_the_backward_op_gives_exactly_the_gradients_asked_for(sample):
    tensor = tensors(sample)
    args, _ = arguments(sample, tensor)
    x, weight, _, *factors = (None if a is None else a.detach() for a in args)
    _, found_hidden, seed = raw_forward(sample, tensor)
    mask = [name in sample.grads for name in NAMES]
    got = torch.ops.rankwise._lora_linear_backward(
        tensor["grad_output"], x, weight, *factors, found_hidden, seed,
        sample.scaling, sample.dropout, sample.rank[0], mask,
    )  # fmt: skip
    assert [gradient is not None for gradient in got] == mask
    found = problem(
        tensor, scaling=sample.scaling, dropout_p=sample.dropout, rank=sample.rank[0], seed=seed
    )
    assert_gradients(
        {name: g for name, g in zip(NAMES, got, strict=True) if g is not None},
        tensor["grad_output"],
        found,
    )


def test_inactive_directions_are_not_read():
    sample = next(
        s for s in SAMPLES if s.rank == (3, 8) and s.gate == "given" and s.shape[0] == (7,)
    )
    tensor = {name: t.detach() for name, t in tensors(sample).items()}
    args, kwargs = arguments(sample, tensor)
    torch.manual_seed(SEED)
    clean = rankwise.ops.lora_linear(*args, **kwargs)
    tensor["lora_A"][3:] = float("nan")
    tensor["lora_B"][:, 3:] = float("nan")
    tensor["lora_E"][3:] = float("nan")
    torch.manual_seed(SEED)
    args, kwargs = arguments(sample, tensor)
    assert_same_bits(rankwise.ops.lora_linear(*args, **kwargs), clean, "y with NaN behind the rank")


def test_without_an_update_the_result_is_that_of_linear():
    x, weight, bias = torch.randn(6, 9), torch.randn(7, 9), torch.randn(7)
    A, B = torch.randn(4, 9), torch.zeros(7, 4)
    y = rankwise.ops.lora_linear(x, weight, bias, A, B, scaling=2.0)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, bias), rtol=0, atol=1e-5)


def test_nan_and_inf_pass_through():
    x, weight = torch.ones(3, 4), torch.ones(5, 4)
    x[1, 2] = float("nan")
    x[2, 0] = float("inf")
    y = rankwise.ops.lora_linear(x, weight, None, torch.ones(2, 4), torch.ones(5, 2), scaling=1.0)
    assert y[0].isfinite().all() and y[1].isnan().all() and y[2].isinf().all()


@st.composite
def layouts(draw):
    """A sample of random sizes, with a random slice of a random permutation as x."""
    lead = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    n_in, n_out = draw(st.integers(0, 19)), draw(st.integers(0, 19))
    capacity = draw(st.integers(0, 9))
    sample = Sample(
        dtype=draw(st.sampled_from(["float64", "float32", "bfloat16", "float16_float32"])),
        shape=(lead, n_in, n_out),
        rank=(draw(st.integers(0, capacity)), capacity),
        gate=draw(st.sampled_from(["none", "given"])),
        dropout=draw(st.sampled_from([0.0, 0.25, 0.9])),
        bias=draw(st.booleans()),
        layout=draw(st.sampled_from(["linear", "conv1d"])),
        operands=draw(st.sampled_from(["contiguous", "strided"])),
    ).sane()
    order = draw(st.permutations(range(len(lead) + 1)))
    steps = draw(st.lists(st.integers(1, 3), min_size=len(order), max_size=len(order)))
    starts = draw(st.lists(st.integers(0, 2), min_size=len(order), max_size=len(order)))
    return sample, order, steps, starts


@given(layouts())
@settings(max_examples=120)
def test_any_strides_of_any_shape(layout):
    sample, order, steps, starts = layout
    tensor = tensors(sample)
    shape = tensor["input"].shape
    sizes = [
        shape[axis] * step + start for axis, step, start in zip(order, steps, starts, strict=True)
    ]
    cuts = tuple(slice(start, None, step) for step, start in zip(steps, starts, strict=True))
    view = torch.empty(sizes, dtype=tensor["input"].dtype)[cuts]
    view = view.permute(*(order.index(axis) for axis in range(len(order))))
    assert view.shape == shape
    view.copy_(tensor["input"].detach())
    tensor["input"] = view.requires_grad_()
    args, kwargs = arguments(sample, tensor)
    torch.manual_seed(SEED)
    seed = raw_forward(sample, tensor)[2]
    torch.manual_seed(SEED)
    y = rankwise.ops.lora_linear(*args, **kwargs)
    found = problem(
        tensor, scaling=sample.scaling, dropout_p=sample.dropout, rank=sample.rank[0], seed=seed
    )
    assert_output(y, found)
    wanted = [NAMES[name] for name in sample.grads]
    gradients = torch.autograd.grad(y, [tensor[n] for n in wanted], tensor["grad_output"])
    assert_gradients(dict(zip(sample.grads, gradients, strict=True)), tensor["grad_output"], found)
    assert exact(y).shape == (*sample.shape[0], sample.shape[2])


@pytest.mark.parametrize("n_out", [6, 16, 70])
def test_bfloat16_results_keep_subnormals_infinities_and_nans(n_out):
    special = [2.0**-133, -(2.0**-130), 2.0**-126, float("inf"), float("nan"), -0.0, 1.5]
    bias = torch.tensor((special * n_out)[:n_out]).bfloat16()
    zeros = torch.zeros(3, 8).bfloat16()
    y = rankwise.ops.lora_linear(
        zeros, zeros.new_ones(n_out, 8), bias, zeros, zeros.new_ones(n_out, 3), scaling=1.0
    )
    torch.testing.assert_close(y, bias.expand(3, -1), rtol=0, atol=0, equal_nan=True)


def test_all_takes_part_where_nothing_is_said():
    x, weight, A, B = (torch.randn(*size) for size in ((5, 4), (3, 4), (2, 4), (3, 2)))
    base = x @ weight.t()
    wanted = base + 2 * (x @ A.t() @ B.t())
    torch.testing.assert_close(rankwise.ops.lora_linear(x, weight, None, A, B, scaling=2.0), wanted)
    (y,) = rankwise.ops.lora_linear_group(x, [weight], [None], [A], [B], [None], scaling=[2.0])
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(rankwise.ops.lora_update(base, x, A, B, scaling=2.0), wanted)
