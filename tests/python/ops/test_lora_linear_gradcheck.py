# gradcheck and gradgradcheck with their defaults over every float64 sample that has a gradient.
import pytest
import torch
from samples import NAMES, SAMPLES, arguments, leaves, views

import rankwise

SAMPLES_64 = [s for s in SAMPLES if s.dtype == "float64" and s.grads]
sampled = pytest.mark.parametrize("sample", SAMPLES_64, ids=[s.id for s in SAMPLES_64])


def function_and_inputs(sample):
    """The op as a function of the contiguous tensors behind those that need a gradient.

    The strided views are made inside, since gradcheck refuses inputs whose elements share memory.
    Each call seeds torch, so that every one draws the same dropout mask.
    """
    leaf = leaves(sample)
    wanted = [NAMES[name] for name in sample.grads]

    def function(*inputs):
        torch.default_generator.manual_seed(5)  # torch.manual_seed formats the stack
        args, kwargs = arguments(
            sample, views(sample, leaf | dict(zip(wanted, inputs, strict=True)))
        )
        return rankwise.ops.lora_linear(*args, **kwargs)

    return function, [leaf[name].requires_grad_() for name in wanted]


@sampled
def test_gradcheck(sample):
    assert torch.autograd.gradcheck(*function_and_inputs(sample))


@sampled
def test_gradgradcheck(sample):
    assert torch.autograd.gradgradcheck(*function_and_inputs(sample))
