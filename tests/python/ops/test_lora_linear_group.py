# lora_linear_group against the oracle of each of its layers, and against lora_linear.
from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from expected import assert_output, exact, problem
from recorded_graphs import recording_backend
from samples import DTYPES, NAMES
from tolerances import assert_close, assert_same_bits

import rankwise

OPS = torch.ops.rankwise
# out_features, (rank, capacity), with E, with a bias, scaling: of q, k and v with grouped queries
LAYERS = [
    (10, (3, 3), False, True, 2.0),
    (6, (2, 5), True, False, 0.5),
    (6, (0, 2), False, True, 1),
]
KINDS = ("weight", "bias", "lora_A", "lora_B", "lora_E")
Layer = dict[str, torch.Tensor]


def draw(dtype: str = "float64", lead=(7,), n_in: int = 8, width: int = 1):
    """x, and the tensors and numbers of LAYERS `width` times as wide; the same ever."""
    base, adapter = DTYPES[dtype]
    generator = torch.Generator().manual_seed(8)

    def normal(*size: int, dtype: torch.dtype = base) -> torch.Tensor:
        values = torch.randn(size, generator=generator, dtype=torch.float64)
        return (values / max(size[-1], 1) ** 0.5).to(dtype)

    layers = []
    for n_out, (_, capacity), gated, biased, _ in LAYERS:
        n_out *= width
        layer = {"weight": normal(n_out, n_in), "lora_A": normal(capacity, n_in, dtype=adapter)}
        layer["lora_B"] = normal(n_out, capacity, dtype=adapter)
        layer |= {"bias": normal(n_out)} if biased else {}
        layers.append(layer | ({"lora_E": normal(capacity, 1, dtype=adapter)} if gated else {}))
    return normal(*lead, n_in), layers


def lists(layers: list[Layer]) -> tuple:
    """The operands behind x, as the ops take them."""
    return tuple([layer.get(kind) for layer in layers] for kind in KINDS)


SCALING = [float(layer[4]) for layer in LAYERS]
RANKS = [layer[1][0] for layer in LAYERS]


def group(x: torch.Tensor, layers: list[Layer], p: float = 0.0) -> list[torch.Tensor]:
    options = dict(scaling=SCALING, dropout_p=p, ranks=RANKS)
    return rankwise.ops.lora_linear_group(x, *lists(layers), **options)


def alone(x: torch.Tensor, layers: list[Layer]) -> list[torch.Tensor]:
    return [
        rankwise.ops.lora_linear(x, *(layer.get(kind) for kind in KINDS), scaling=s, rank=r)
        for layer, s, r in zip(layers, SCALING, RANKS, strict=True)
    ]


def tracked(x: torch.Tensor, layers: list[Layer]) -> list[torch.Tensor]:
    return [t.requires_grad_() for t in (x, *(layer[k] for layer in layers for k in layer))]


def grad_outputs(outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.cos(3 * y.detach() + i) for i, y in enumerate(outputs)]


def check(dtype: str, p: float, **sizes) -> None:
    x, layers = draw(dtype, **sizes)
    torch.manual_seed(5)
    with torch.no_grad():
        *_, seed = OPS._lora_linear_group_forward(x, *lists(layers), SCALING, p, RANKS)
    tracked(x, layers)
    torch.manual_seed(5)
    outputs = group(x, layers, p)
    dy = grad_outputs(outputs)
    torch.autograd.backward(outputs, dy)
    names = {name: short for short, name in NAMES.items()}
    dx, magnitude = 0.0, 0.0
    for i, layer in enumerate(layers):
        numbers = dict(scaling=SCALING[i], dropout_p=p, rank=RANKS[i], seed=seed)
        found = problem({"input": x, **layer}, **numbers)
        assert outputs[i].dtype == x.dtype
        assert_output(outputs[i], found, f"y of layer {i}")
        wanted = oracle.gradients(found, exact(dy[i]))
        largest = oracle.gradients(found.absolute(), np.abs(exact(dy[i])))
        dx, magnitude = dx + wanted["x"], magnitude + largest["x"]
        for kind, tensor in layer.items():
            short = names[kind]
            assert_close(tensor.grad, wanted[short], largest[short], f"d {kind} of layer {i}")
    assert_close(x.grad, dx, magnitude, "dx")


@pytest.mark.parametrize("p", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_and_gradients_match_the_oracle(dtype, p):
    check(dtype, p)


@pytest.mark.parametrize("path", ["micro-kernel", "ATen", "measured"])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bfloat16_float32"])
def test_many_tiles_on_every_path(dtype, p, path):
    rankwise.ops.set_cpu_path(path)
    check(dtype, p, lead=(2, 65), n_in=200, width=22)


@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 0), (2, 1, 3)])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_any_leading_dimensions(dtype, lead):
    check(dtype, 0.25, lead=lead)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_group_of_one_has_the_bits_of_its_layer(dtype, p):
    x, (_, layer, _) = draw(dtype, lead=(70,), n_in=40, width=12)
    inputs = tracked(x, [layer])
    torch.manual_seed(3)
    y = rankwise.ops.lora_linear(x, *(layer.get(k) for k in KINDS), scaling=0.5, dropout_p=p)
    torch.manual_seed(3)
    (own,) = rankwise.ops.lora_linear_group(x, *lists([layer]), scaling=[0.5], dropout_p=p)
    assert_same_bits(own, y, "y")
    (dy,) = grad_outputs([y])
    for got, wanted in zip(
        torch.autograd.grad(own, inputs, dy), torch.autograd.grad(y, inputs, dy), strict=True
    ):
        assert_same_bits(got, wanted, "a gradient")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16_float32"])
def test_the_same_bits_for_any_number_of_threads(dtype):
    x, layers = draw(dtype, lead=(300,), n_in=96, width=20)
    inputs = tracked(x, layers)

    def step() -> list[torch.Tensor]:
        torch.manual_seed(2)
        outputs = group(x, layers, 0.1)
        return [*outputs, *torch.autograd.grad(outputs, inputs, grad_outputs(outputs))]

    first = step()
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        for got, wanted in zip(step(), first, strict=True):
            assert_same_bits(got, wanted, f"with {threads} threads")


def test_layers_without_a_part_in_the_loss_get_no_gradients():
    x, layers = draw()
    tracked(x, layers)
    outputs, (first, _, last) = group(x, layers), alone(x, layers)
    inputs = [x, *layers[0].values(), *layers[2].values()]
    wanted = torch.autograd.grad([first, last], inputs, grad_outputs([first, last]))
    torch.autograd.backward([outputs[0], outputs[2]], grad_outputs([first, last]))
    assert all(tensor.grad is None for tensor in layers[1].values())
    for tensor, gradient in zip(inputs, wanted, strict=True):
        torch.testing.assert_close(tensor.grad, gradient)


def test_gradients_of_those_alone_that_ask_for_them():
    x, layers = draw()
    asked = [layers[0]["lora_A"], layers[1]["lora_E"], layers[2]["bias"]]
    for tensor in asked:
        tensor.requires_grad_()
    got = torch.autograd.grad(group(x, layers), asked, grad_outputs(group(x, layers)))
    wanted = torch.autograd.grad(alone(x, layers), asked, grad_outputs(alone(x, layers)))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_gradcheck_and_gradgradcheck(p):
    x, layers = draw(lead=(3,), n_in=4)
    keys = [(i, kind) for i, layer in enumerate(layers) for kind in layer]

    def function(x, *tensors):
        torch.default_generator.manual_seed(5)
        seen = [{}, {}, {}]
        for (i, kind), tensor in zip(keys, tensors, strict=True):
            seen[i][kind] = tensor
        return tuple(group(x, seen, p))

    inputs = tracked(x, layers)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_the_ops_pass_opcheck(p):
    x, layers = draw("float32")
    numbers = dict(scaling=SCALING, dropout_p=p, ranks=RANKS)
    plain = (x, *lists(layers))
    forward = (*plain, SCALING, p, RANKS)
    *outputs, hidden, seed = OPS._lora_linear_group_forward(*forward)
    torch.library.opcheck(OPS._lora_linear_group_forward.default, forward)
    weights, _, A, B, E = lists(layers)
    operands = (grad_outputs(outputs), x, weights, A, B, E, hidden, seed, SCALING, p, RANKS)
    for mask in ([True] * 6, [True, False, False, True, True, False], [False] * 5 + [True]):
        torch.library.opcheck(OPS._lora_linear_group_backward.default, (*operands, mask))
    tracked(x, layers)
    torch.library.opcheck(OPS.lora_linear_group.default, plain, numbers)


def test_vmap_and_forward_mode():
    x, layers = draw()
    layers = [{k: t for k, t in layer.items() if k != "bias"} for layer in layers]
    y = group(x, layers)
    torch.testing.assert_close(torch.vmap(lambda x: tuple(group(x, layers)))(x), tuple(y))
    _, tangents = torch.func.jvp(lambda x: tuple(group(x, layers)), (x,), (x,))
    torch.testing.assert_close(tangents, tuple(y))  # it is linear


def test_autocast_lowers_the_base_and_keeps_masters():
    x, layers = draw("float32")
    with torch.autocast("cpu", torch.bfloat16):
        outputs = group(x, layers)
    low = [{k: t.bfloat16() if k in ("weight", "bias") else t for k, t in layer.items()}
           for layer in layers]  # fmt: skip
    for got, wanted in zip(outputs, group(x.bfloat16(), low), strict=True):
        assert_same_bits(got, wanted, "y under autocast")


def test_compiled_graphs_hold_the_op_whole():
    backend, called = recording_backend()
    x, layers = draw("float32")
    tracked(x, layers)
    compiled = torch.compile(lambda x: group(x * 2, layers), fullgraph=True, backend=backend)
    outputs = compiled(x)
    for got, wanted in zip(outputs, group(x * 2, layers), strict=True):
        assert_same_bits(got, wanted, "compiled y")
    torch.autograd.backward(outputs, grad_outputs(outputs))
    assert OPS._lora_linear_group_forward.default in called["forward"]
    assert OPS._lora_linear_group_backward.default in called["backward"]


def test_saved_for_backward_are_x_the_factors_and_one_hidden():
    x, layers = draw()
    tracked(x, layers)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        group(x, layers)
    held = {t.data_ptr() for t in (x, *(layer[k] for layer in layers for k in layer))}
    new = [t for t in saved if t.data_ptr() not in held and t.numel()]
    assert [tuple(t.shape) for t in new] == [(7, sum(RANKS))]


REFUSED = [  # argument, what it becomes of layer 1, the message
    ("weight", lambda t: t[:, :7], r"weight must be|input must be \[..., 7\]"),
    ("weight", lambda t: t.half(), "layer 1: weight must be float64 like input, got float16"),
    ("lora_A", lambda t: t[:, :7], r"layer 1: lora_A must be \[rank, 8\], got \[5, 7\]"),
    ("lora_B", lambda t: t[:, :4], r"layer 1: lora_B must be \[6, 5\], got \[6, 4\]"),
    ("lora_E", lambda t: t.t(), r"layer 1: lora_E must be \[5, 1\], got \[1, 5\]"),
]


@pytest.mark.parametrize("kind, change, message", REFUSED)
def test_refusals_name_layer_and_argument(kind, change, message):
    x, layers = draw()
    layers[1][kind] = change(layers[1][kind])
    with pytest.raises(RuntimeError, match=f"lora_linear_group.*{message}"):
        group(x, layers)


def test_refused_numbers_and_lengths():
    x, layers = draw("bfloat16")
    call = rankwise.ops.lora_linear_group
    weights, *others = lists(layers)
    with pytest.raises(RuntimeError, match="dropout_p must be in"):
        call(x, *lists(layers), scaling=SCALING, dropout_p=1.5)
    with pytest.raises(RuntimeError, match=r"layer 1: rank must be in \[0, 5\], got 6"):
        call(x, *lists(layers), scaling=SCALING, ranks=[3, 6, 0])
    with pytest.raises(RuntimeError, match="scaling must have an element for each .* got 2 .* 3"):
        call(x, *lists(layers), scaling=SCALING[:2])
    with pytest.raises(RuntimeError, match="at least one weight, got 0"):
        call(x, [], [], [], [], [], scaling=[])
    mixed = [{k: t.float() if "lora" in k and i else t for k, t in layer.items()}
             for i, layer in enumerate(layers)]  # fmt: skip
    with pytest.raises(RuntimeError, match="layer 1: lora_A must be .* like layer 0's"):
        group(x, mixed)
