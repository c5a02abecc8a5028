# lora_embedding against the oracle of the linear layer over one-hot rows, and what it refuses.
"""An embedding is a linear layer whose input rows are one-hot: y = onehot(i) W0 + ..."""

import numpy as np
import oracle
import pytest
import torch
from expected import assert_output, exact, problem
from recorded_graphs import recording_backend
from samples import DTYPES, subsets
from tolerances import assert_close, assert_same_bits
from torch.func import jacfwd, jacrev, vmap
from torch.profiler import ProfilerActivity, profile

import rankwise

OPS = torch.ops.rankwise
NUM, DIM = 11, 7
NAMES = ("weight", "lora_A", "lora_B", "lora_E")
SUBSETS = [[NAMES["WABE".index(key)] for key in keys] for keys in subsets("WABE") if keys]
RANKS = [(0, 0), (4, 4), (3, 6)]
INDICES = {
    "1d": torch.tensor([3, 0, 10, 3, 5]),
    "2d": torch.tensor([[1, 1, 2], [9, 4, 4]], dtype=torch.int32),
    "one": torch.tensor(6),
    "empty": torch.zeros(2, 0, dtype=torch.int64),
}


def tensors(
    dtype: str, rank: int, gated: bool, size: tuple[int, int] = (NUM, DIM), device: str = "cpu"
) -> dict[str, torch.Tensor]:
    base, adapter = DTYPES[dtype]
    num, dim = size
    made = {
        "weight": torch.randn(num, dim).to(base),
        "lora_A": torch.randn(rank, num).to(adapter),
        "lora_B": torch.randn(dim, rank).to(adapter),
    }
    if gated:
        made["lora_E"] = torch.randn(rank, 1).to(adapter)
    return {name: tensor.to(device).requires_grad_() for name, tensor in made.items()}


def embed(tensor, indices=INDICES["2d"], **options):
    return rankwise.ops.lora_embedding(indices, **tensor, scaling=0.5, **options)


def one_hot_problem(indices, tensor, rank):
    weight = tensor["weight"].detach()
    rows = torch.nn.functional.one_hot(indices.long(), weight.shape[0]).to(weight.dtype)
    return problem(tensor | {"input": rows, "weight": weight.t()}, scaling=1.5, rank=rank)


def check(
    indices: torch.Tensor, tensor: dict[str, torch.Tensor], rank: int, padding_idx: int | None
) -> None:
    y = rankwise.ops.lora_embedding(
        indices, **tensor, scaling=1.5, padding_idx=padding_idx, rank=rank
    )
    assert y.dtype == tensor["weight"].dtype
    found = one_hot_problem(indices, tensor, rank)
    assert_output(y, found)

    dy = torch.randn_like(y)
    got = dict(zip(tensor, torch.autograd.grad(y, list(tensor.values()), dy), strict=True))
    wanted = oracle.gradients(found, exact(dy))
    sizes = oracle.gradients(found.absolute(), np.abs(exact(dy)))
    wanted["W"], sizes["W"] = wanted["W"].T, sizes["W"].T
    if padding_idx is not None:
        wanted["W"][padding_idx] = wanted["A"][:, padding_idx] = 0
    for key, name in zip("WABE", ("weight", "lora_A", "lora_B", "lora_E"), strict=True):
        if name in got:
            assert got[name].dtype == tensor[name].dtype
            assert_close(got[name], wanted[key], sizes[key], f"gradient of {name}")


@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("rank, capacity", RANKS)
@pytest.mark.parametrize("shape", INDICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype, shape, rank, capacity, gated, padding_idx):
    check(INDICES[shape], tensors(dtype, capacity, gated), rank, padding_idx)


@pytest.mark.parametrize("rank, dim", [(0, DIM), (4, 0)])
def test_rows_without_width_are_not_summed_by_aten(rank, dim):
    """ATen's CUDA kernel for embedding_dense_backward reads out of bounds for them."""
    tensor = tensors("float32", 4, True, (NUM, dim))
    y = embed(tensor, rank=rank)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True) as seen:
        gradients = torch.autograd.grad(y, list(tensor.values()), torch.ones_like(y))
    calls = [e for e in seen.events() if e.name == "aten::embedding_dense_backward"]
    assert [call.input_shapes[0] for call in calls] == [[6, dim or rank]]
    for gradient, of in zip(gradients, tensor.values(), strict=True):
        assert gradient.shape == of.shape
        assert of is tensor["weight"] or not gradient.any()


def test_second_order_gradients_without_directions():
    tensor = tensors("float64", 2, True)
    y = embed(tensor, rank=0)
    gradients = torch.autograd.grad(y.sum(), list(tensor.values()), create_graph=True)
    assert all(gradient.requires_grad for gradient in gradients[1:])


@pytest.mark.parametrize("gated", [True, False])
def test_gradcheck(gated):
    tensor = tensors("float64", 3, gated)

    def function(*values):
        named = dict(zip(tensor, values, strict=True))
        return rankwise.ops.lora_embedding(INDICES["2d"], **named, scaling=0.5)

    assert torch.autograd.gradcheck(function, list(tensor.values()))
    assert torch.autograd.gradgradcheck(function, list(tensor.values()))


@pytest.mark.parametrize("wanted", SUBSETS, ids=str)
def test_every_subset_of_gradients(wanted):
    tensor = tensors("float64", 4, True)
    dy = torch.randn(2, 3, DIM, dtype=torch.float64)
    every = torch.autograd.grad(embed(tensor), list(tensor.values()), dy)
    chosen = {name: t.detach().requires_grad_(name in wanted) for name, t in tensor.items()}
    got = torch.autograd.grad(embed(chosen), [chosen[name] for name in wanted], dy)
    for name, gradient in zip(wanted, got, strict=True):
        assert_same_bits(gradient, every[list(tensor).index(name)], f"gradient of {name}")


@pytest.mark.parametrize("only", NAMES)
def test_gradients_under_functorch_and_in_forward_mode(only):
    tensor = {name: t.detach() for name, t in tensors("float64", 4, True).items()}

    def function(value):
        return embed(tensor | {only: value})

    expected = torch.autograd.functional.jacobian(function, tensor[only])
    torch.testing.assert_close(jacrev(function)(tensor[only]), expected)
    torch.testing.assert_close(jacfwd(function)(tensor[only]), expected)


def test_vmap_over_indices_and_adapters():
    many = [tensors("float64", 4, True) for _ in range(3)]
    rows = torch.randint(NUM, (3, 5))
    stacked = {name: torch.stack([tensor[name] for tensor in many]) for name in NAMES}
    got = vmap(lambda i, named: embed(named, i))(rows, stacked)
    for y, i, tensor in zip(got, rows, many, strict=True):
        torch.testing.assert_close(y, embed(tensor, i))


def test_autocast_leaves_it_alone_as_it_does_an_embedding():
    tensor = tensors("float32", 4, True)
    with torch.autocast("cpu", torch.bfloat16):
        y = embed(tensor)
        gradients = torch.autograd.grad(y.sum(), list(tensor.values()))
    assert_same_bits(y, embed(tensor), "y under autocast")
    expected = torch.autograd.grad(embed(tensor).sum(), list(tensor.values()))
    for name, a, b in zip(tensor, gradients, expected, strict=True):
        assert_same_bits(a, b, f"gradient of {name} under autocast")


def test_compiled_graphs_hold_the_ops_whole():
    backend, called = recording_backend()
    compiled = torch.compile(embed, fullgraph=True, dynamic=True, backend=backend)
    tensor = tensors("float32", 4, True)
    for shape in [(2, 3), (4, 5)]:
        indices = torch.randint(NUM, shape)
        y, expected = compiled(tensor, indices), embed(tensor, indices)
        assert_same_bits(y, expected, "y")
        dy = torch.randn_like(y)
        got = torch.autograd.grad(y, list(tensor.values()), dy)
        wanted = torch.autograd.grad(expected, list(tensor.values()), dy)
        for name, a, b in zip(tensor, got, wanted, strict=True):
            assert_same_bits(a, b, f"gradient of {name}")
    assert OPS._lora_embedding_forward.default in called["forward"]
    assert OPS._lora_embedding_backward.default in called["backward"]


WRONG = [  # argument, its wrong value, wanted, got
    ("indices", torch.tensor([0.5]), "int64 or int32", "Float"),
    ("indices", torch.tensor([0, 2]).to_sparse(), "dense", "layout Sparse"),
    ("weight", torch.zeros(NUM, DIM).to_sparse(), "dense", "layout Sparse"),
    ("weight", torch.zeros(NUM), r"\[num_embeddings, embedding_dim\]", r"\[11\]"),
    ("lora_A", torch.zeros(4, 12), r"\[rank, 11\]", r"\[4, 12\]"),
    ("lora_B", torch.zeros(7, 5), r"\[7, 4\]", r"\[7, 5\]"),
    ("lora_E", torch.zeros(4), r"\[4, 1\]", r"\[4\]"),
    ("lora_A", torch.zeros(4, NUM, dtype=torch.bfloat16), "float32", "bfloat16"),
    ("rank", 5, r"\[0, 4\]", "5"),
    ("scaling", float("nan"), "finite", "nan"),
]


@pytest.mark.parametrize("argument, value, wanted, got", WRONG)
def test_refusals(argument, value, wanted, got):
    arguments = {"indices": INDICES["1d"], **tensors("float32", 4, True), "scaling": 1.0}
    with pytest.raises(RuntimeError, match=rf"lora_embedding: {argument} must .*{wanted}.*{got}"):
        rankwise.ops.lora_embedding(**arguments | {argument: value})


BACKWARD_WRONG = [  # argument of the inner backward op, its wrong value, wanted, got
    (1, torch.zeros(5), "indices must be int64 or int32", "Float"),
    (0, torch.zeros(5, 6), r"grad_output must be \[5, 7\]", r"\[5, 6\]"),
    (0, torch.zeros(5, DIM).double(), "grad_output must be float32 like weight", "float64"),
    (6, torch.zeros(5, 3), r"hidden must be \[5, 4\]", r"\[5, 3\]"),
    (6, torch.zeros(5, 4).double(), "hidden must be float32 like lora_A", "float64"),
]


@pytest.mark.parametrize("place, value, wanted, got", BACKWARD_WRONG)
def test_refusals_of_the_backward_op(place, value, wanted, got):
    tensor = [t.detach() for t in tensors("float32", 4, True).values()]
    args = [torch.zeros(5, DIM), INDICES["1d"], *tensor, torch.zeros(5, 4), 1.0, -1, 4, [True] * 4]
    args[place] = value
    with pytest.raises(RuntimeError, match=f"lora_embedding: {wanted}.*got.*{got}"):
        OPS._lora_embedding_backward(*args)


@pytest.mark.parametrize("index", [-1, NUM])
def test_index_out_of_range(index):
    with pytest.raises(IndexError):
        rankwise.ops.lora_embedding(
            torch.tensor([index]), **tensors("float32", 4, True), scaling=1.0
        )


@pytest.mark.parametrize("row", [-NUM - 1, -NUM, NUM - 1, NUM])
def test_a_padding_idx_is_a_row(row):
    tensor = tensors("float32", 4, True)

    def embed():
        return rankwise.ops.lora_embedding(
            torch.arange(NUM), **tensor, scaling=1.0, padding_idx=row
        )

    if not -NUM <= row < NUM:
        wanted = rf"lora_embedding: padding_idx must be in \[-{NUM}, {NUM}\), got {row}"
        with pytest.raises(ValueError, match=wanted):
            embed()
        return
    (got,) = torch.autograd.grad(embed().sum(), tensor["weight"])
    assert [i for i in range(NUM) if not got[i].any()] == [row % NUM]


def test_a_negative_padding_idx_counts_from_the_end_as_in_torch():
    tensor = tensors("float32", 4, True)
    y = rankwise.ops.lora_embedding(
        torch.tensor([NUM - 1, 0]), **tensor, scaling=1.0, padding_idx=-1
    )
    (got,) = torch.autograd.grad(y.sum(), tensor["weight"])
    assert not got[NUM - 1].any() and got[0].any()
