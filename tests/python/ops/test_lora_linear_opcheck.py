# torch.library.opcheck, all of its tests, on every op; the public op over every sample.
"""opcheck seeds torch before the eager and before the traced run, so samples with dropout are
compared like the others: a traced graph must draw from torch's generator exactly as eager does."""

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


@sampled(SOME)
def test_lora_embedding(sample):
    tensor = tensors(sample)
    _, n_in, n_out = sample.shape
    if "W" in sample.grads or sample.operands == "contiguous":
        tensor["weight"] = (
            tensor["weight"].detach().t().contiguous().requires_grad_("W" in sample.grads)
        )
    else:
        tensor["weight"] = tensor["weight"].detach().t()
    rows = max(n_in, 1)
    indices = torch.arange(2 * rows).reshape(2, rows).remainder(rows)[:, : n_in and None]
    args = (indices, tensor["weight"], tensor["lora_A"], tensor["lora_B"], tensor.get("lora_E"))
    kwargs = {"scaling": sample.scaling, "padding_idx": n_in - 1, "rank": sample.rank[0]}
    torch.library.opcheck(OPS.lora_embedding.default, args, kwargs)


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
