# Parts of PEFT's layers that do more than a product: hooks, subclasses, tensors that are computed.
# Each must come out as PEFT computes it, also when it changes after the first call.
import pytest
import torch
from peft_models import (
    Doubled,
    both,
    counted,
    layer_of,
    linear,
)
from torch import nn
from torch.nn.utils import parametrize

import rankwise.integrations.peft as rp

HOOKS = {
    "forward": lambda module, seen: module.register_forward_hook(lambda m, a, y: seen.append(y)),
    "pre": lambda module, seen: module.register_forward_pre_hook(lambda m, a: seen.append(a)),
    "backward": lambda module, seen: module.register_full_backward_hook(
        lambda m, into, out: seen.append(out)
    ),
    "backward pre": lambda module, seen: module.register_full_backward_pre_hook(
        lambda m, out: seen.append(out)
    ),
}
PLACES = {
    "base": lambda layer: layer.base_layer,
    "A": lambda layer: layer.lora_A["default"],
    "B": lambda layer: layer.lora_B["default"],
    "dropout": lambda layer: layer.lora_dropout["default"],
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_on_parts_of_a_layer_are_called(place, kind):
    model, x = linear(), torch.randn(3, 8, requires_grad=True)
    rp.accelerate(model)
    model(x)
    seen: list = []
    handle = HOOKS[kind](PLACES[place](layer_of(model)), seen)
    with counted(model) as count:
        model(x).sum().backward()
    assert len(seen) == 1
    assert count == ({"fused": 1} if place == "base" else {"hooks on the adapter": 1})
    handle.remove()
    with counted(model) as count:
        model(x)
    assert count == {"fused": 1} and len(seen) == 1


@pytest.mark.parametrize("place", PLACES)
def test_what_a_hook_changes_counts(place):
    model, x = linear(), torch.randn(3, 8)
    PLACES[place](layer_of(model)).register_forward_hook(lambda m, a, y: 2 * y)
    expected, result, _ = both(model, x)
    torch.testing.assert_close(result, expected)


def test_a_forward_of_the_instance():
    model, x = linear(), torch.randn(3, 8)
    rp.accelerate(model)
    model(x)
    base = layer_of(model).base_layer
    base.forward = lambda x: torch.zeros(3, 6)
    expected, result, _ = both(model, x)
    torch.testing.assert_close(result, expected)


def test_hooks_on_all_modules():
    model, x, seen = linear(), torch.randn(3, 8), []
    rp.accelerate(model)
    model(x)
    register = nn.modules.module.register_module_forward_hook
    handle = register(lambda module, args, result: seen.append(type(module)))
    try:
        with counted(model) as count:
            model(x)
    finally:
        handle.remove()
    assert count == {"hooks on all modules": 1} and seen.count(nn.Linear) == 3


class Named(nn.Linear):
    """Computes as nn.Linear does."""


@pytest.mark.parametrize("base", [Doubled(8, 6), Named(8, 6)])
def test_subclasses_of_linear_layers(base):
    expected, result, count = both(linear(base=base), torch.randn(3, 8))
    torch.testing.assert_close(result, expected)
    assert count == {"fused": 1}


@pytest.mark.parametrize("tensor", ["weight", "bias"])
@pytest.mark.parametrize("part", ["base", "A", "B"])
def test_parametrised_tensors(part, tensor):
    model, x = linear(lora_bias=True), torch.randn(3, 8)
    module = PLACES[part](layer_of(model))
    if getattr(module, tensor) is None:
        module.bias = nn.Parameter(torch.randn(4))
    rp.accelerate(model)
    model(x)

    class Half(nn.Module):
        def forward(self, tensor):
            return tensor / 2

    parametrize.register_parametrization(module, tensor, Half())
    expected, result, _ = both(model, x)
    torch.testing.assert_close(result, expected)


def test_a_bias_of_lora_A():
    model, x = linear(), torch.randn(3, 8)
    rp.accelerate(model)
    model(x)
    layer_of(model).lora_A["default"].bias = nn.Parameter(torch.randn(4))
    expected, result, _ = both(model, x)
    torch.testing.assert_close(result, expected)


def test_weights_that_are_other_tensors():
    class Kept(torch.Tensor):
        pass

    model = linear()
    base = layer_of(model).base_layer
    base.weight = nn.Parameter(base.weight.detach().as_subclass(Kept), requires_grad=False)
    expected, result, count = both(model, torch.randn(3, 8))
    torch.testing.assert_close(result.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor))
