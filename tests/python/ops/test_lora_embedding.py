# lora_embedding against the oracle of the linear layer over one-hot rows, and what it refuses.
"""An embedding is a linear layer whose input rows are one-hot: y = onehot(i) W0 + ..."""

import numpy as np
import oracle
import pytest
import torch
from expected import assert_output, exact, problem
from samples import DTYPES
from tolerances import assert_close

import rankwise

NUM, DIM = 11, 7
INDICES = {
    "1d": torch.tensor([3, 0, 10, 3, 5]),
    "2d": torch.tensor([[1, 1, 2], [9, 4, 4]], dtype=torch.int32),
    "one": torch.tensor(6),
    "empty": torch.zeros(2, 0, dtype=torch.int64),
}


def tensors(dtype: str, rank: int, gated: bool) -> dict[str, torch.Tensor]:
    base, adapter = DTYPES[dtype]
    made = {
        "weight": torch.randn(NUM, DIM).to(base),
        "lora_A": torch.randn(rank, NUM).to(adapter),
        "lora_B": torch.randn(DIM, rank).to(adapter),
    }
    if gated:
        made["lora_E"] = torch.randn(rank, 1).to(adapter)
    return {name: tensor.requires_grad_() for name, tensor in made.items()}


def one_hot_problem(indices, tensor, rank):
    rows = torch.nn.functional.one_hot(indices.long(), NUM).to(tensor["weight"].dtype)
    linear = tensor | {"input": rows, "weight": tensor["weight"].detach().t()}
    return problem(linear, scaling=1.5, rank=rank)


@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("rank, capacity", [(0, 0), (4, 4), (3, 6)])
@pytest.mark.parametrize("shape", INDICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype, shape, rank, capacity, gated, padding_idx):
    indices, tensor = INDICES[shape], tensors(dtype, capacity, gated)
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


@pytest.mark.parametrize("gated", [True, False])
def test_gradcheck(gated):
    tensor = tensors("float64", 3, gated)

    def function(*values):
        named = dict(zip(tensor, values, strict=True))
        return rankwise.ops.lora_embedding(INDICES["2d"], **named, scaling=0.5)

    assert torch.autograd.gradcheck(function, list(tensor.values()))
    assert torch.autograd.gradgradcheck(function, list(tensor.values()))


WRONG = [  # argument, its wrong value, wanted, got
    ("indices", torch.tensor([0.5]), "int64 or int32", "Float"),
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


@pytest.mark.parametrize("index", [-1, NUM])
def test_index_out_of_range(index):
    with pytest.raises(IndexError):
        rankwise.ops.lora_embedding(
            torch.tensor([index]), **tensors("float32", 4, True), scaling=1.0
        )


def test_a_negative_padding_idx_counts_from_the_end_as_in_torch():
    tensor = tensors("float32", 4, True)
    y = rankwise.ops.lora_embedding(
        torch.tensor([NUM - 1, 0]), **tensor, scaling=1.0, padding_idx=-1
    )
    (got,) = torch.autograd.grad(y.sum(), tensor["weight"])
    assert not got[NUM - 1].any() and got[0].any()
