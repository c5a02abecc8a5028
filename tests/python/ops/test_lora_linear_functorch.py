# lora_linear under torch.func and forward-mode AD: grad, vmap, jvp, jacrev, hessian, and together.
from dataclasses import replace

import numpy as np
import pytest
import torch
from expected import assert_gradients, assert_output, problem
from oracle import dropout_keep_scale, dropout_mask
from tolerances import assert_same_bits
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import rankwise

NAMES = ("input", "weight", "bias", "lora_A", "lora_B", "lora_E")
KEYS = dict(zip(("x", "W", "b", "A", "B", "E"), NAMES, strict=True))
CASES = [(dtype, p) for dtype in (torch.float64, torch.float32) for p in (0.0, 0.4)]
SCALING, RANK = 1.5, 2


def data(dtype: torch.dtype = torch.float64, tokens: int = 4) -> dict[str, torch.Tensor]:
    shapes = [(tokens, 6), (5, 6), (5,), (3, 6), (5, 3), (3, 1)]
    return {
        name: torch.randn(shape, dtype=dtype) for name, shape in zip(NAMES, shapes, strict=True)
    }


def apply(tensor: dict[str, torch.Tensor], p: float = 0.0) -> torch.Tensor:
    return rankwise.ops.lora_linear(
        *(tensor[name] for name in NAMES), scaling=SCALING, dropout_p=p, rank=RANK
    )


def seed_of(tensor: dict[str, torch.Tensor], p: float) -> torch.Tensor:
    return torch.ops.rankwise._lora_linear_forward(
        *(tensor[name] for name in NAMES), SCALING, p, RANK
    )[2]


def solved(tensor: dict[str, torch.Tensor], p: float = 0.0, seed: torch.Tensor | None = None):
    return problem(tensor, scaling=SCALING, dropout_p=p, rank=RANK, seed=seed)


def seeded(function, *args):
    torch.manual_seed(9)
    return function(*args)


@pytest.mark.parametrize("dtype, p", CASES)
def test_grad_of_every_argument(dtype, p):
    tensor, dy = data(dtype), torch.randn(4, 5, dtype=dtype)
    got = seeded(grad(lambda t: (apply(t, p) * dy).sum()), tensor)
    found = solved(tensor, p, seeded(seed_of, tensor, p))
    assert_gradients({key: got[name] for key, name in KEYS.items()}, dy, found)


@pytest.mark.parametrize("dtype, p", CASES)
def test_vjp_returns_the_value_and_the_gradient(dtype, p):
    tensor, dy = data(dtype), torch.randn(4, 5, dtype=dtype)
    y, pull = seeded(lambda: vjp(lambda t: apply(t, p), tensor))
    found = solved(tensor, p, seeded(seed_of, tensor, p))
    assert_output(y, found)
    assert_gradients({key: pull(dy)[0][name] for key, name in KEYS.items()}, dy, found)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_jvp_and_forward_mode_agree_with_differences(p):
    tensor, tangent = data(), data()
    primal, got = seeded(lambda: jvp(lambda t: apply(t, p), (tensor,), (tangent,)))
    seed = seeded(seed_of, tensor, p)
    assert_output(primal, solved(tensor, p, seed))

    step = 1e-5
    ahead = {name: tensor[name] + step * tangent[name] for name in NAMES}
    behind = {name: tensor[name] - step * tangent[name] for name in NAMES}
    expected = (seeded(apply, ahead, p) - seeded(apply, behind, p)) / (2 * step)
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-7)

    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(tensor[name], tangent[name]) for name in NAMES}
        value, derivative = forward_ad.unpack_dual(seeded(apply, dual, p))
    torch.testing.assert_close(value, primal)
    torch.testing.assert_close(derivative, got)


@pytest.mark.parametrize("only", NAMES)
def test_forward_mode_of_one_argument(only):
    tensor, tangent = data(), data()
    got = jvp(lambda t: apply(tensor | {only: t}), (tensor[only],), (tangent[only],))[1]
    zero = tensor | {only: torch.zeros_like(tensor[only])}
    expected = apply(tensor | {only: tangent[only]}) - apply(zero)  # linear in each argument
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("only", NAMES)
def test_jacobians_forward_and_reverse_are_the_same(only):
    tensor = data(tokens=2)

    def function(t):
        return apply(tensor | {only: t})

    reverse = jacrev(function)(tensor[only])
    torch.testing.assert_close(reverse, jacfwd(function)(tensor[only]))
    expected = torch.autograd.functional.jacobian(function, tensor[only])
    torch.testing.assert_close(reverse, expected)


def test_hessian_of_the_factors():
    tensor = data(tokens=2)

    def loss(A, B, E):
        return apply(tensor | {"lora_A": A, "lora_B": B, "lora_E": E}).square().sum()

    factors = tuple(tensor[name] for name in NAMES[3:])
    got = hessian(loss, argnums=(0, 1, 2))(*factors)
    expected = torch.autograd.functional.hessian(loss, factors)
    for row, expected_row in zip(got, expected, strict=True):
        for block, expected_block in zip(row, expected_row, strict=True):
            torch.testing.assert_close(block, expected_block)


@pytest.mark.parametrize("dim", [0, 1])
def test_vmap_over_inputs(dim):
    tensor, batch = data(), torch.randn(3, 4, 6, dtype=torch.float64).movedim(0, dim)
    got = vmap(lambda x: apply(tensor | {"input": x}), in_dims=dim)(batch)
    for y, x in zip(got, batch.unbind(dim), strict=True):
        assert_output(y, solved(tensor | {"input": x}))


@pytest.mark.parametrize("mapped", [("lora_A", "lora_B"), ("lora_A", "lora_B", "lora_E"), NAMES])
def test_vmap_over_several_adapters(mapped):
    many = [data() for _ in range(3)]
    stacked = [torch.stack([tensor[name] for tensor in many]) for name in mapped]
    got = vmap(lambda *parts: apply(many[0] | dict(zip(mapped, parts, strict=True))))(*stacked)
    for y, tensor in zip(got, many, strict=True):
        assert_output(y, solved(many[0] | {name: tensor[name] for name in mapped}))


def mask_layer(x: torch.Tensor, p: float = 0.5) -> torch.Tensor:
    """Its output is its dropped input."""
    eye = torch.eye(x.shape[-1])
    return rankwise.ops.lora_linear(x, 0 * eye, None, eye, eye, scaling=1.0, dropout_p=p)


def test_vmap_with_the_same_dropout():
    batch = torch.ones(4, 8, 32)
    got = seeded(vmap(mask_layer, randomness="same"), batch)
    alone = seeded(mask_layer, batch[0])
    assert all(torch.equal(y, alone) for y in got)


def test_vmap_with_different_dropout():
    got = vmap(mask_layer, randomness="different")(torch.ones(4, 8, 32))
    assert set(got.unique().tolist()) == {0.0, dropout_keep_scale(0.5)}
    for i in range(4):
        assert 0.3 < got[i].count_nonzero() / got[i].numel() < 0.7
        assert all(not torch.equal(got[i], got[j]) for j in range(i))


def test_vmap_refuses_dropout_unless_told_which():
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(mask_layer)(torch.ones(4, 8, 32))
    assert vmap(lambda x: mask_layer(x, 0.0))(torch.ones(4, 8, 32)).shape == (4, 8, 32)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_per_sample_gradients(p):
    tensor, batch = data(), torch.randn(3, 4, 6, dtype=torch.float64)
    dy = torch.randn(4, 5, dtype=torch.float64)
    factors = {name: tensor[name] for name in NAMES[3:]}

    def loss(chosen, x):
        return (apply(tensor | chosen | {"input": x}, p) * dy).sum()

    got = seeded(vmap(grad(loss), in_dims=(None, 0), randomness="same"), factors, batch)
    seed = seeded(seed_of, tensor, p)
    for i, x in enumerate(batch):
        one = {key: got[KEYS[key]][i] for key in "ABE"}
        assert_gradients(one, dy, solved(tensor | {"input": x}, p, seed))


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name, value in data().items():
            if name != "input":
                self.register_parameter(name, torch.nn.Parameter(value))

    def forward(self, x):
        return apply({"input": x, **dict(self.named_parameters())})


def test_functional_call_with_an_ensemble_of_parameters():
    layer, x = Layer(), torch.randn(4, 6, dtype=torch.float64)
    members = [
        {name: torch.randn_like(t) for name, t in layer.named_parameters()} for _ in range(3)
    ]
    stacked = {name: torch.stack([m[name] for m in members]) for name in members[0]}
    got = vmap(lambda parameters: functional_call(layer, parameters, (x,)))(stacked)
    for y, member in zip(got, members, strict=True):
        assert_output(y, solved(member | {"input": x}))


def test_derivatives_of_transformed_functions_reach_plain_autograd():
    tensor = data()
    x = tensor["input"].requires_grad_()
    y = vmap(lambda row: apply(tensor | {"input": row}))(x)
    dy = torch.randn(4, 5, dtype=torch.float64)
    (got,) = torch.autograd.grad(y, x, dy)
    assert_gradients({"x": got}, dy, solved(tensor))


@pytest.mark.parametrize("gated", [True, False])
def test_an_input_of_one_dimension(gated):
    tensor = data()
    tensor["input"] = tensor["input"][0].clone()
    if not gated:
        tensor["lora_E"] = None
    x, tangent, dy = tensor["input"], torch.randn(6).double(), torch.randn(5).double()
    found = solved(tensor)

    def function(x):
        return apply(tensor | {"input": x})

    y, pull = vjp(function, x)
    assert_output(y, found)
    assert_gradients({"x": pull(dy)[0]}, dy, found)
    value, derivative = jvp(function, (x,), (tangent,))
    assert_output(value, found)
    assert_output(derivative, replace(found, x=tangent.numpy(), bias=None))
    assert_output(vmap(function)(x[None])[0], found)


def test_a_transform_leaves_plain_calls_on_the_fused_op():
    tensor = data()
    before = apply(tensor)
    vmap(lambda x: apply(tensor | {"input": x}))(torch.randn(3, 4, 6, dtype=torch.float64))
    grad(lambda t: apply(t).sum())(tensor)
    assert_same_bits(apply(tensor), before, "y after a transform")
    y = apply(tensor | {"lora_B": tensor["lora_B"].clone().requires_grad_()})
    assert "LoraLinear" in y.grad_fn.name()


def test_masks_of_several_seeds_under_vmap():
    seeds = torch.tensor([[0], [-1], [2**62 + 12345], [-(2**63)]])
    got = vmap(lambda seed: rankwise.ops.dropout_mask(seed, 7, 13, 0.3))(seeds)
    for seed, mask in zip(seeds, got, strict=True):
        np.testing.assert_array_equal(mask.numpy(), dropout_mask(seed.item(), 7, 13, 0.3))
