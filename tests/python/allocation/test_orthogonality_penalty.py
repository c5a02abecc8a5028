# orthogonality_penalty: value and gradients against the oracle and PEFT's formula.
import math

import numpy as np
import pytest
import torch
from allocation_models import network, train, trained
from allocation_oracle import penalty
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import unit_roundoff

from rankwise.ops import orthogonality_penalty

FORMS = {"squared_sum": True, "mean_norm": False}
SHAPES = [(5, 7, 4, 3), (3, 2, 4, 4), (6, 1, 1, 1), (1, 9, 5, 2)]  # (in, out, capacity, rank)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def factors(shapes=SHAPES, dtype=torch.float64, seed=0):
    """(lora_A, lora_B, ranks), leaves."""
    generator = torch.Generator().manual_seed(seed)

    def new(*shape):
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.6
        return values.to(dtype).requires_grad_()

    As = [new(capacity, n_in) for n_in, _, capacity, _ in shapes]
    Bs = [new(n_out, capacity) for _, n_out, capacity, _ in shapes]
    return As, Bs, [rank for *_, rank in shapes]


def arrays(tensors) -> list[np.ndarray]:
    return [t.detach().double().numpy() for t in tensors]


def peft_penalty(As, Bs) -> torch.Tensor:
    """As AdaLoraModel.forward: the mean of the norms."""
    terms = [torch.norm(A @ A.T - torch.eye(len(A), dtype=A.dtype), p="fro") for A in As]
    terms += [torch.norm(B.T @ B - torch.eye(B.shape[1], dtype=B.dtype), p="fro") for B in Bs]
    return sum(terms) / len(terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_value_and_gradients(form, dtype):
    As, Bs, ranks = factors(dtype=dtype)
    value = orthogonality_penalty(As, Bs, squared=FORMS[form], ranks=ranks)
    wanted, *gradients = penalty(arrays(As), arrays(Bs), ranks, FORMS[form])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert value.dtype == wide and value.shape == ()
    assert abs(value.item() - wanted) <= 64 * unit_roundoff(wide) * abs(wanted)
    (value * 1.5).backward()
    for got, exact in zip(As + Bs, sum(gradients, []), strict=True):
        assert got.grad.dtype == dtype and got.grad.shape == got.shape
        limit = 64 * unit_roundoff(wide) + 2 * unit_roundoff(dtype)
        difference = np.abs(got.grad.double().numpy() - 1.5 * exact)
        scale = np.abs(1.5 * exact).max() if wide == dtype else np.abs(1.5 * exact)
        assert np.all(difference <= limit * scale + 64 * unit_roundoff(wide))
    for A, B, rank in zip(As, Bs, ranks, strict=True):
        assert not A.grad[rank:].any() and not B.grad[:, rank:].any()


@settings(max_examples=60)
@given(st.data())
def test_any_sizes(data):
    sizes = st.tuples(*[st.integers(1, 9)] * 2, st.integers(0, 6), st.integers(0, 6))
    shapes = [
        (i, o, max(c, r), r) for i, o, c, r in data.draw(st.lists(sizes, min_size=1, max_size=4))
    ]
    squared = data.draw(st.booleans())
    As, Bs, ranks = factors(shapes, seed=data.draw(st.integers(0, 99)))
    value = orthogonality_penalty(As, Bs, squared=squared, ranks=ranks)
    wanted, *gradients = penalty(arrays(As), arrays(Bs), ranks, squared)
    assert abs(value.item() - wanted) <= 1e-13 * abs(wanted)
    value.backward()
    for got, exact in zip(As + Bs, sum(gradients, []), strict=True):
        np.testing.assert_allclose(got.grad.numpy(), exact, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_mean_norm_is_pefts(dtype):
    shapes = [(i, o, c, c) for i, o, c, _ in SHAPES]
    As, Bs, _ = factors(shapes, dtype)
    ours, theirs = orthogonality_penalty(As, Bs, squared=False), peft_penalty(As, Bs)
    limit = 64 * unit_roundoff(dtype)
    torch.testing.assert_close(ours, theirs, rtol=limit, atol=0)
    got = torch.autograd.grad(ours, As + Bs)
    for a, b in zip(got, torch.autograd.grad(theirs, As + Bs), strict=True):
        torch.testing.assert_close(a, b, rtol=limit, atol=limit)


@pytest.mark.parametrize("form", FORMS)
def test_orthonormal_factors_have_penalty_0_and_gradient_0(form):
    A = torch.eye(3, 5, dtype=torch.float64).requires_grad_()
    B = torch.eye(4, 3, dtype=torch.float64).requires_grad_()
    for function in (torch.autograd.grad, functional_grad):
        value = orthogonality_penalty([A], [B], squared=FORMS[form])
        assert value.item() == 0
        for gradient in (
            function(value, [A, B])
            if function is torch.autograd.grad
            else function(FORMS[form], A.detach(), B.detach())
        ):
            assert torch.equal(gradient, torch.zeros_like(gradient))


def functional_grad(squared: bool, A, B):
    return torch.func.grad(
        lambda a, b: orthogonality_penalty([a], [b], squared=squared), argnums=(0, 1)
    )(A, B)


@pytest.mark.parametrize("form", FORMS)
def test_rank_0_has_no_penalty(form):
    As, Bs, _ = factors([(4, 3, 5, 0), (2, 6, 3, 0)])
    value = orthogonality_penalty(As, Bs, squared=FORMS[form], ranks=[0, 0])
    assert value.item() == 0
    value.backward()
    assert not any(t.grad.any() for t in As + Bs)
    As, Bs, _ = factors([(4, 3, 0, 0)])
    assert orthogonality_penalty(As, Bs, squared=FORMS[form]).item() == 0


@pytest.mark.parametrize("form", FORMS)
def test_the_allocators_penalty_follows_its_ranks(form):
    model, allocator = network(total_steps=4, final_steps=1)
    optimizer = torch.optim.SGD(trained(model), 0.05)
    allocator.attach(optimizer)
    for step in range(1, 6):
        layers = [model.first, model.second, model.third]
        As, Bs = [x.lora_A for x in layers], [x.lora_B for x in layers]
        wanted = penalty(arrays(As), arrays(Bs), [x.rank for x in layers], FORMS[form])[0]
        got = allocator.orthogonality_penalty(form)
        assert math.isclose(got.item(), wanted, rel_tol=1e-13) and got.requires_grad
        train(model, optimizer, [step])
    assert sum(x.rank for x in layers) == 6
    assert allocator.orthogonality_penalty().item() == pytest.approx(
        allocator.orthogonality_penalty("squared_sum").item(), abs=0
    )


def test_training_on_the_penalty_makes_directions_orthonormal():
    model, allocator = network(total_steps=400, alpha=1.0)
    optimizer = torch.optim.Adam(trained(model), 0.02)
    first = allocator.orthogonality_penalty().item()
    for _ in range(300):
        optimizer.zero_grad()
        loss = allocator.orthogonality_penalty()
        loss.backward()
        optimizer.step()
    assert first > 10
    # 6 directions cannot be orthonormal in 3 dimensions: ||D||^2 >= 3, once
    assert 3 - 1e-6 <= loss.item() <= 3.01
