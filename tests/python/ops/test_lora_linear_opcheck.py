# torch.library.opcheck, all of its tests, on every op; the public op over every sample.
"""opcheck seeds torch before the eager and before the traced run, so samples with dropout are
compared like the others: a traced graph must draw from torch's generator exactly as eager does."""

from dataclasses import replace

import pytest
import torch
from expected import raw_forward
from samples import DTYPES, NAMES, SAMPLES, arguments, tensors

import rankwise  # noqa: F401  registers the ops

OPS = torch.ops.rankwise
SOME = SAMPLES[::11]
DROPPING = [s for s in SAMPLES if s.dropout in (0.1, 0.5, 1.0)][::9]
FLOATS = sorted({base for base, _ in DTYPES.values()}, key=str)


def sampled(samples):
    return pytest.mark.parametrize("sample", samples, ids=[s.id for s in samples])


def frozen(sample):
    return {name: tensor.detach() for name, tensor in tensors(sample).items()}


@sampled(SAMPLES)
def test_lora_linear(sample):
    args, kwargs = arguments(sample, tensors(sample))
    torch.library.opcheck(OPS.lora_linear.default, args, kwargs)


@sampled(SOME)
def test_forward_op(sample):
    args, kwargs = arguments(sample, frozen(sample))
    args = (*args, kwargs["scaling"], kwargs["dropout_p"], sample.rank[0])
    torch.library.opcheck(OPS._lora_linear_forward.default, args)


@sampled(SOME)
def test_backward_op(sample):
    tensor = frozen(sample)
    args, kwargs = arguments(sample, tensor)
    _, hidden, seed = raw_forward(sample, tensor)
    mask = [name in sample.grads for name in NAMES]
    args = (tensor["grad_output"], *args[:2], *args[3:], hidden, seed, *kwargs.values())
    args = (*args, mask) if "rank" in kwargs else (*args, sample.rank[0], mask)
    torch.library.opcheck(OPS._lora_linear_backward.default, args)


@sampled(DROPPING)
def test_dropout_mask(sample):
    lead, cols, _ = sample.shape
    rows = int(torch.Size(lead).numel())
    args = (torch.tensor([sample.rank[1] - 7]), rows, cols, sample.dropout)
    torch.library.opcheck(OPS._dropout_mask.default, args, {"dtype": DTYPES[sample.dtype][1]})


def embedding_arguments(sample, tensor):
    """Indices, weight [in, out], A, B, E; scaling, padding index and rank."""
    _, n_in, _ = sample.shape
    weight = tensor["weight"].detach().t()
    if "W" in sample.grads or sample.operands == "contiguous":
        weight = weight.contiguous().requires_grad_("W" in sample.grads)
    rows = max(n_in, 1)
    indices = torch.arange(2 * rows).reshape(2, rows).remainder(rows)[:, : n_in and None]
    factors = (tensor[name] if name in tensor else None for name in ("lora_A", "lora_B", "lora_E"))
    return (indices, weight, *factors), (sample.scaling, n_in - 1, sample.rank[0])


@sampled(SOME)
def test_lora_embedding(sample):
    args, numbers = embedding_arguments(sample, tensors(sample))
    kwargs = dict(zip(("scaling", "padding_idx", "rank"), numbers, strict=True))
    torch.library.opcheck(OPS.lora_embedding.default, args, kwargs)


@sampled(SOME)
def test_embedding_forward_op(sample):
    args, numbers = embedding_arguments(replace(sample, grads=""), frozen(sample))
    torch.library.opcheck(OPS._lora_embedding_forward.default, (*args, *numbers))


@sampled(SOME)
def test_embedding_backward_op(sample):
    args, numbers = embedding_arguments(replace(sample, grads=""), frozen(sample))
    output, hidden = OPS._lora_embedding_forward(*args, *numbers)
    mask = [name in sample.grads for name in "WABE"]
    args = (torch.randn_like(output), *args, hidden, *numbers, mask)
    torch.library.opcheck(OPS._lora_embedding_backward.default, args)


@sampled(SOME)
def test_merged_weight(sample):
    tensor = frozen(sample)
    args = (tensor["weight"], tensor["lora_A"], tensor["lora_B"], tensor.get("lora_E"))
    kwargs = {"scaling": sample.scaling, "rank": sample.rank[0]}
    torch.library.opcheck(OPS.merged_weight.default, args, kwargs)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_path(dtype):
    path = OPS._lora_linear_path(torch.empty(1, dtype=dtype))
    assert isinstance(path, str) and path
