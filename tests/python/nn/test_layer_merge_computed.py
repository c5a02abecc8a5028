# Layers whose tensors something else computes: what merge and unmerge refuse, and what goes on.
import warnings

import pytest
import torch
from layer_cases import KINDS, exact_weight, example, make
from tolerances import assert_same_bits
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import rankwise as rw
from rankwise.computed import compute_anew


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def twice(layer, name):
    parametrize.register_parametrization(layer, name, Twice())


def normed(layer, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(layer, name)


def pruned(layer, name):
    prune.l1_unstructured(layer, name, amount=0.3)


REMOVE = "remove_parametrizations"
# {case: (what computes a tensor, what the refusal names, how it is undone)}
COMPUTED = {
    "weight_norm": (parametrizations.weight_norm, "WeightNorm", REMOVE),
    "spectral_norm": (parametrizations.spectral_norm, "SpectralNorm", REMOVE),
    "orthogonal": (parametrizations.orthogonal, "Orthogonal", REMOVE),
    "parametrize": (twice, "Twice", REMOVE),
    "old weight_norm": (normed, "WeightNorm", "remove_weight_norm"),
    "old spectral_norm": (torch.nn.utils.spectral_norm, "SpectralNorm", "remove_spectral_norm"),
    "prune": (pruned, "L1Unstructured", "prune.remove"),
}


def undo(layer, name, removed_by):
    if removed_by == REMOVE:
        parametrize.remove_parametrizations(layer, name)
    elif removed_by == "prune.remove":
        prune.remove(layer, name)
    else:
        getattr(torch.nn.utils, removed_by)(layer, name)
    if name not in layer._parameters:  # torch leaves a frozen weight_norm's result a plain tensor
        setattr(layer, name, nn.Parameter(getattr(layer, name), requires_grad=False))


def assert_state(layer, before):
    now = layer.state_dict()
    assert list(now) == list(before)
    for name, value in before.items():
        assert_same_bits(now[name], value, name)


def state(layer):
    return {name: value.clone() for name, value in layer.state_dict().items()}


@pytest.mark.parametrize("case", COMPUTED)
@pytest.mark.parametrize("kind", KINDS)
def test_a_computed_weight_is_refused_by_name_and_nothing_changes(kind, case):
    compute, named, removed_by = COMPUTED[case]
    layer = make(kind).eval()
    layer.weight.data[2] = 1.0  # no norm is 0
    compute(layer, "weight")
    x = example(layer)
    output, before = layer(x).detach(), state(layer)
    wanted = rf"merge: the layer's weight is .*\({named}\); call .*{removed_by}\(layer, 'weight'\)"
    with pytest.raises(RuntimeError, match=wanted):
        layer.merge()
    assert not layer.merged
    assert_state(layer, before)
    assert_same_bits(layer(x).detach(), output, "output")
    undo(layer, "weight", removed_by)
    layer.merge()
    torch.testing.assert_close(layer(x), output, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", COMPUTED)
def test_a_merged_weight_that_is_computed_since_is_not_unmerged(case):
    compute, named, removed_by = COMPUTED[case]
    layer = make("linear").eval()
    base = layer.weight
    layer.merge()
    compute(layer, "weight")
    x = example(layer)
    output, before = layer(x).detach(), state(layer)
    with pytest.raises(RuntimeError, match=rf"unmerge: the layer's weight is .*{named}"):
        layer.unmerge()
    assert layer.merged
    assert_state(layer, before)
    assert_same_bits(layer(x).detach(), output, "output")
    undo(layer, "weight", removed_by)
    layer.unmerge()
    assert layer.weight is base


def test_a_weight_that_is_no_parameter_is_refused():
    layer = make("linear")
    weight = layer.weight.detach().clone()
    del layer.weight
    with pytest.raises(RuntimeError, match="the layer's weight is missing; give the layer"):
        layer.merge()
    layer.weight = weight
    with pytest.raises(RuntimeError, match=r"a plain Tensor.*set layer.weight = torch.nn.Par"):
        layer.merge()
    assert layer.weight is weight and not layer.merged


FACTOR_CASES = ["weight_norm", "parametrize", "prune", "old weight_norm"]
OTHERS = [(name, case) for name in ("lora_A", "lora_B") for case in FACTOR_CASES]


@pytest.mark.parametrize("name, case", [*OTHERS, ("bias", "parametrize"), ("bias", "prune")])
def test_other_computed_tensors_merge_as_they_are_now(name, case):
    compute = COMPUTED[case][0]
    layer = make("linear").eval()
    compute(layer, name)
    x = example(layer)
    layer(x)
    with torch.no_grad():  # as an optimizer does, after the last forward
        for key, parameter in layer.named_parameters():
            if name in key:
                parameter.mul_(1.5)
    layer.merge()
    weight = layer.weight
    layer.unmerge()
    wanted = layer(x)  # computes the factors anew
    exact = exact_weight(layer, layer.weight)
    torch.testing.assert_close(weight.double(), exact, rtol=1e-6, atol=1e-6)
    layer.merge()
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", COMPUTED)
def test_forward_and_gradients_follow_a_computed_weight(case):
    layer = make("linear").double().train()
    COMPUTED[case][0](layer, "weight")
    layer.eval()  # spectral norms go on iterating in training mode
    x = example(layer)
    layer(x).square().sum().backward()
    got = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    compute_anew(layer)
    update = layer.scaling * layer.lora_B @ layer.lora_A
    nn.functional.linear(x, layer.weight + update, layer.bias).square().sum().backward()
    wanted = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
    assert {"lora_A", "lora_B"} < set(got) | {"weight"} and set(got) == set(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("operation", ["merge", "unmerge"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError, MemoryError])
def test_a_failure_while_the_weight_is_replaced_leaves_the_layer(monkeypatch, operation, error):
    layer = make("linear").eval()
    if operation == "unmerge":
        layer.merge()
    before, weight, merged = state(layer), layer.weight, layer.merged
    original = rw.nn.LoRALinear.__setattr__

    def fail(self, name, value):
        original(self, name, value)
        if name == "weight":
            raise error("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr(rw.nn.LoRALinear, "__setattr__", fail)
        with pytest.raises(error):
            getattr(layer, operation)()
    assert layer.weight is weight and layer.merged is merged
    assert_state(layer, before)
    getattr(layer, operation)()
    assert layer.merged is not merged


def test_a_layer_unmerged_by_hand_in_a_merged_model_has_its_adapter_in_the_state_again():
    model = nn.Sequential(make("linear"), nn.Tanh())
    rw.merge(model)
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    model[0].unmerge()
    assert {"0.lora_A", "0.lora_B"} < set(model.state_dict())
