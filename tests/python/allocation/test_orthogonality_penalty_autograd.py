# orthogonality_penalty under autograd, functorch, opcheck, compile and autocast; its errors.
import re

import pytest
import torch
from test_orthogonality_penalty import SHAPES, factors
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from rankwise.ops import orthogonality_penalty

OP = torch.ops.rankwise.orthogonality_penalty
BOTH = pytest.mark.parametrize("squared", [True, False])


def of_flat(squared, ranks, count):
    return lambda *t: orthogonality_penalty(t[:count], t[count:], squared=squared, ranks=ranks)


@BOTH
def test_gradcheck_and_gradgradcheck(squared):
    As, Bs, ranks = factors()
    function = of_flat(squared, ranks, len(As))
    assert torch.autograd.gradcheck(function, As + Bs)
    assert torch.autograd.gradgradcheck(function, As + Bs)


@BOTH
def test_forward_mode(squared):
    As, Bs, ranks = factors(SHAPES[:2])
    function = of_flat(squared, ranks, len(As))
    assert torch.autograd.gradcheck(function, As + Bs, check_forward_ad=True)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_opcheck(squared, dtype):
    As, Bs, ranks = factors(dtype=dtype)
    torch.library.opcheck(OP.default, (As, Bs, ranks, squared))
    torch.library.opcheck(OP.default, (As, Bs, [0] * len(As), squared))
    detached = [t.detach() for t in As], [t.detach() for t in Bs]
    torch.library.opcheck(OP.default, (*detached, ranks, squared))


@BOTH
def test_functional_grad_vmap_and_hessian(squared):
    As, Bs, ranks = factors(SHAPES[:2])
    function = of_flat(squared, ranks, len(As))
    inputs = tuple(t.detach() for t in As + Bs)
    got = torch.func.grad(function, argnums=tuple(range(4)))(*inputs)
    for a, b in zip(got, torch.autograd.grad(function(*As, *Bs), As + Bs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    batched = [torch.stack([t, 2 * t, -t]) for t in inputs]
    values = torch.func.vmap(function)(*batched)
    for i in range(3):
        torch.testing.assert_close(values[i], function(*(t[i] for t in batched)))
    hessian = torch.func.hessian(function)(*inputs)
    slow = torch.autograd.functional.hessian(function, inputs)[0][0]
    torch.testing.assert_close(hessian, slow, rtol=1e-9, atol=1e-10)


@BOTH
def test_one_node_over_all_factors(squared):
    As, Bs, ranks = factors()
    value = orthogonality_penalty(As, Bs, squared=squared, ranks=ranks)
    below = [node for node, _ in value.grad_fn.next_functions if node is not None]
    assert [type(node).__name__ for node in below] == ["AccumulateGrad"] * 8
    assert {id(node.variable) for node in below} == {id(t) for t in As + Bs}


@BOTH
def test_only_what_requires_gradients_gets_one(squared):
    As, Bs, ranks = factors()
    wanted = torch.autograd.grad(orthogonality_penalty(As, Bs, squared=squared, ranks=ranks), Bs)
    value = orthogonality_penalty([A.detach() for A in As], Bs, squared=squared, ranks=ranks)
    assert all(map(torch.equal, torch.autograd.grad(value, Bs), wanted))
    with torch.no_grad():
        assert orthogonality_penalty(As, Bs, squared=squared).grad_fn is None
    frozen = [t.detach() for t in As], [t.detach() for t in Bs]
    assert not orthogonality_penalty(*frozen, squared=squared).requires_grad


@BOTH
def test_a_factor_changed_before_backward_is_an_error(squared):
    As, Bs, _ = factors(SHAPES[:1])
    value = orthogonality_penalty(As, Bs, squared=squared)
    with torch.no_grad():
        As[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@BOTH
def test_transposed_and_sliced_factors(squared):
    As, Bs, ranks = factors()
    wanted = orthogonality_penalty(As, Bs, squared=squared, ranks=ranks)
    strided = [
        [t.detach().t().contiguous().t().requires_grad_() for t in tensors] for tensors in (As, Bs)
    ]
    value = orthogonality_penalty(*strided, squared=squared, ranks=ranks)
    torch.testing.assert_close(value, wanted, rtol=1e-13, atol=0)
    got = torch.autograd.grad(value, strided[0] + strided[1])
    for a, b in zip(got, torch.autograd.grad(wanted, As + Bs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.fixture
def fresh_compiler():
    counters.clear()
    with fresh_cache():
        yield


COMPILED = [("eager", True), ("aot_eager", True), ("aot_eager", False), ("inductor", False)]


@pytest.mark.parametrize("backend, squared", COMPILED)
def test_compiles_to_one_graph(squared, backend, fresh_compiler):
    shapes = SHAPES[:1] if backend == "inductor" else SHAPES  # its C++ compiler is slow
    As, Bs, ranks = factors(shapes, dtype=torch.float32)

    def loss(*tensors):
        return 0.1 * of_flat(squared, ranks, len(As))(*tensors) + tensors[0].sum()

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    got, wanted = compiled(*As, *Bs), loss(*As, *Bs)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)
    for a, b in zip(
        torch.autograd.grad(got, As + Bs), torch.autograd.grad(wanted, As + Bs), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1


@BOTH
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(squared, low):
    As, Bs, ranks = factors(dtype=torch.float32)
    wanted = orthogonality_penalty(As, Bs, squared=squared, ranks=ranks)
    gradients = torch.autograd.grad(wanted, As + Bs)
    with torch.autocast("cpu", dtype=low):
        value = orthogonality_penalty(As, Bs, squared=squared, ranks=ranks)
        inside = torch.autograd.grad(value, As + Bs, retain_graph=True)
    outside = torch.autograd.grad(value, As + Bs)
    assert value.dtype == torch.float32 and torch.equal(value, wanted)
    for a, b, c in zip(inside, outside, gradients, strict=True):
        assert torch.equal(a, c) and torch.equal(b, c)


def test_errors_name_the_argument_the_wanted_and_the_got():
    (A,), (B,), _ = factors([(5, 7, 4, 4)])
    cases = [
        (([A, A], [B]), {}, "lists of one length > 0, got 2, 1"),
        (([], []), {}, "lists of one length > 0, got 0"),
        (([A], [B.t()]), {}, "must be [capacity, in] and lora_B[0] [out, capacity], got [4, 5]"),
        (([A[0]], [B]), {}, "lora_A[0] must be [capacity, in]"),
        (([A], [B.float()]), {}, "one floating-point dtype, got double, double and float"),
        (([A], [B]), {"ranks": [5]}, "ranks[0] must be in [0, 4], got 5"),
        (([A], [B]), {"ranks": [-1]}, "ranks[0] must be in [0, 4], got -1"),
        (([A], [B]), {"ranks": [1, 1]}, "lists of one length > 0, got 1, 1 and 2"),
    ]
    for args, kwargs, message in cases:
        pattern = "orthogonality_penalty: .*" + re.escape(message)
        with pytest.raises(RuntimeError, match=re.compile(pattern, re.IGNORECASE)):
            orthogonality_penalty(*args, **kwargs)
