# Nested tensors of both layouts: what the plain op gives for each component, and its gradients.
import pytest
import torch
from torch import nn

import rankwise as rw

LAYOUTS = [torch.strided, torch.jagged]
IN, OUT, RANK, ROWS, DIM = 8, 6, 3, 9, 4


def nested(components, layout):
    return torch.nested.nested_tensor(components, layout=layout)


def factors(inputs: int, outputs: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def new(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()

    return {"lora_A": new(RANK, inputs), "lora_B": new(outputs, RANK), "lora_E": new(RANK, 1)}


def linear_arguments() -> dict[str, torch.Tensor]:
    weight = torch.randn(OUT, IN, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(OUT, dtype=torch.float64, requires_grad=True)
    return {"weight": weight, "bias": bias, **factors(IN, OUT)}


def components(*shapes, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def weighted(parts) -> torch.Tensor:
    """A loss in which every element counts otherwise."""
    flat = torch.cat([part.reshape(-1) for part in parts])
    return (flat * torch.linspace(-1, 1, flat.numel(), dtype=flat.dtype)).sum()


def assert_like_components(op, parts, layout, parameters, grad=True) -> None:
    """op(nested) and all gradients are those of op(component) for each."""
    inputs = [p.clone().requires_grad_(grad) for p in parts]
    expected = [op(x) for x in inputs]
    leaves = [*inputs, *parameters] if grad else parameters
    wanted = torch.autograd.grad(weighted(expected), leaves)
    twins = [p.clone().requires_grad_(grad) for p in parts]
    result = op(torch.nested.as_nested_tensor(twins, layout=layout))
    assert result.is_nested and result.layout == layout
    for got, want in zip(result.unbind(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    leaves = [*twins, *parameters] if grad else parameters
    got = torch.autograd.grad(weighted(result.unbind()), leaves)
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shapes", [
    [(3, IN), (5, IN)],
    [(3, IN), (0, IN), (1, IN)],
    [(3, 2, IN), (1, 2, IN)],
], ids=str)  # fmt: skip
def test_lora_linear(layout, shapes):
    arguments = linear_arguments()
    for rank in (None, 2):
        assert_like_components(
            lambda x, rank=rank: rw.ops.lora_linear(x, **arguments, scaling=2.0, rank=rank),
            components(*shapes), layout, list(arguments.values()),
        )  # fmt: skip


def test_components_that_differ_in_more_than_one_size():
    arguments = linear_arguments()
    assert_like_components(
        lambda x: rw.ops.lora_linear(x, **arguments, scaling=2.0),
        components((3, 2, IN), (1, 4, IN)), torch.strided, list(arguments.values()),
    )  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lora_embedding(layout):
    table = torch.randn(ROWS, DIM, dtype=torch.float64, requires_grad=True)
    arguments = {"weight": table, **factors(ROWS, DIM)}
    parts = [torch.tensor([1, 2, 2]), torch.tensor([8, 0]), torch.tensor([2])]
    assert_like_components(
        lambda i: rw.ops.lora_embedding(i, **arguments, scaling=2.0, padding_idx=2),
        parts, layout, list(arguments.values()), grad=False,
    )  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_autograd(layout, mode):
    arguments = linear_arguments()
    table = torch.randn(ROWS, DIM, dtype=torch.float64)
    parts = components((3, IN), (5, IN))
    indices = [torch.tensor([1, 2]), torch.tensor([3])]
    with mode():
        got = rw.ops.lora_linear(nested(parts, layout), **arguments, scaling=2.0)
        rows = rw.ops.lora_embedding(
            nested(indices, layout), table, **factors(ROWS, DIM), scaling=2.0
        )
    for x, y in zip(parts, got.unbind(), strict=True):
        torch.testing.assert_close(y, rw.ops.lora_linear(x, **arguments, scaling=2.0))
    assert [row.shape for row in rows.unbind()] == [(2, DIM), (1, DIM)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropout_drops_and_its_backward_knows_what(layout):
    arguments = linear_arguments()
    x = nested(components((40, IN), (20, IN)), layout)
    torch.manual_seed(0)
    first = rw.ops.lora_linear(x, **arguments, scaling=2.0, dropout_p=0.5)
    torch.manual_seed(0)
    second = rw.ops.lora_linear(x, **arguments, scaling=2.0, dropout_p=0.5)
    kept = rw.ops.lora_linear(x, **arguments, scaling=2.0)
    flat, again, whole = (torch.cat(t.unbind()) for t in (first, second, kept))
    assert torch.equal(flat, again) and not torch.allclose(flat, whole)
    torch.manual_seed(0)
    rows = torch.cat(x.unbind())
    dense = rw.ops.lora_linear(rows, **arguments, scaling=2.0, dropout_p=0.5)
    leaves = list(arguments.values())
    got = torch.autograd.grad(weighted([flat]), leaves)
    torch.testing.assert_close(got, torch.autograd.grad(weighted([dense]), leaves))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_within_a_model(layout):
    """Jagged ones keep their lengths' identity, so that residual connections work."""
    layer = rw.nn.LoRALinear.from_linear(nn.Linear(IN, IN), rank=2)
    nn.init.normal_(layer.lora_B)
    embedding = rw.nn.LoRAEmbedding(ROWS, IN, rank=2)
    parts = [torch.tensor([1, 2]), torch.tensor([3, 4, 5])]
    x = embedding(nested(parts, layout))
    y = x + layer(x)
    for indices, got in zip(parts, y.unbind(), strict=True):
        h = embedding(indices)
        torch.testing.assert_close(got, h + layer(h), rtol=1e-5, atol=1e-5)
    weighted(y.unbind()).backward()
    assert layer.lora_A.grad.abs().sum() > 0 and embedding.lora_A.grad.abs().sum() > 0
    wanted = layer(x.detach())
    layer.eval().merge()
    for got, want in zip(layer(x.detach()).unbind(), wanted.unbind(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_autocast(layout):
    layer = rw.nn.LoRALinear(IN, OUT, rank=2)
    x = nested([part.float() for part in components((3, IN), (5, IN))], layout)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def values() -> dict:
    return {"input": torch.randn(3, IN, dtype=torch.float64), **linear_arguments()}


@pytest.mark.parametrize("grad", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B", "lora_E"])
def test_other_nested_arguments_are_refused_by_name(name, grad):
    arguments = values()
    halves = arguments[name].detach().chunk(2)
    arguments[name] = nested(list(halves), torch.strided)
    with grad(), pytest.raises(RuntimeError, match=f"lora_linear: {name} must be dense"):
        rw.ops.lora_linear(**arguments, scaling=2.0)


def test_components_that_do_not_fit_are_refused():
    arguments = linear_arguments()
    for parts, wanted in [
        (components((3, IN), (2, IN - 1)), "one last size in all components, got 8 and 7"),
        (components((3, IN - 1)), r"input must be \[\.\.\., 8\], got \[3, 7\]"),
        ([], "input must have a component, got none"),
    ]:
        with pytest.raises(RuntimeError, match=f"lora_linear: input must .*{wanted[-12:]}"):
            rw.ops.lora_linear(nested(parts, torch.strided), **arguments, scaling=2.0)


def test_the_dispatchers_op_says_what_to_do_with_jagged_ones():
    x = nested(components((3, IN), (5, IN)), torch.jagged)
    with pytest.raises(RuntimeError, match=r"lora_linear: input must be.*its values\(\)"):
        torch.ops.rankwise.lora_linear(x, **linear_arguments(), scaling=2.0)


SPARSE = {
    "coo": torch.Tensor.to_sparse,
    "csr": torch.Tensor.to_sparse_csr,
    "mkldnn": lambda tensor: tensor.float().to_mkldnn(),
}


@pytest.mark.parametrize("name, kind", [
    *[(name, kind) for name in ("lora_A", "lora_B", "lora_E") for kind in ("coo", "csr")],
    ("bias", "coo"), ("weight", "coo"), ("input", "csr"), ("input", "mkldnn"),
])  # fmt: skip
def test_sparse_arguments_are_refused_by_name(name, kind):
    arguments = {key: value.detach() for key, value in values().items()}
    arguments[name] = SPARSE[kind](arguments[name])
    wanted = rf"lora_linear: {name} must be dense, got layout .*; call to_dense\(\) first"
    with pytest.raises(RuntimeError, match=wanted):
        rw.ops.lora_linear(**arguments, scaling=2.0)


@pytest.mark.parametrize("name", ["input", "weight"])
def test_what_sparse_products_compute_is_computed(name):
    arguments = {key: value.detach() for key, value in values().items()}
    wanted = rw.ops.lora_linear(**arguments, scaling=2.0)
    arguments[name] = SPARSE["coo" if name == "input" else "csr"](arguments[name])
    torch.testing.assert_close(rw.ops.lora_linear(**arguments, scaling=2.0), wanted)


def test_a_sparse_input_is_refused_with_dropout_and_in_backward():
    arguments = values()
    arguments["input"] = arguments["input"].to_sparse()
    with pytest.raises(RuntimeError, match="lora_linear: input must be dense, got layout Sparse"):
        rw.ops.lora_linear(**arguments, scaling=2.0, dropout_p=0.5)
    output = rw.ops.lora_linear(**arguments, scaling=2.0)
    with pytest.raises(RuntimeError, match="lora_linear: input must be dense, got layout Sparse"):
        output.sum().backward()


def test_masked_inputs_are_refused_by_name():
    layer = rw.nn.LoRALinear(IN, OUT)
    x = torch.masked.masked_tensor(torch.randn(2, IN), torch.rand(2, IN) > 0.5)
    with pytest.raises(TypeError, match=r"lora_linear: input must be a plain tensor.*get_data"):
        layer(x)
    indices = torch.masked.masked_tensor(torch.tensor([1, 2]), torch.tensor([True, False]))
    with pytest.raises(TypeError, match="lora_embedding: indices must be a plain tensor"):
        rw.nn.LoRAEmbedding(ROWS, DIM)(indices)


def test_sparse_indices_and_tables_are_refused_by_name():
    table, f = torch.randn(ROWS, DIM, dtype=torch.float64), factors(ROWS, DIM)
    with pytest.raises(RuntimeError, match="lora_embedding: indices must be dense"):
        rw.ops.lora_embedding(torch.tensor([[1, 0]]).to_sparse(), table, **f, scaling=1.0)
    with pytest.raises(RuntimeError, match="lora_embedding: weight must be dense"):
        rw.ops.lora_embedding(torch.tensor([1, 0]), table.to_sparse(), **f, scaling=1.0)
