# merge(model) and unmerge(model) when something is wrong or fails in the middle: all or none.
import pytest
import torch
from small_models import adapted, assert_unchanged, bert, fingerprint, output, randomise
from tolerances import assert_same_bits
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import rankwise as rw
from rankwise.adapted import Adapted

CONFIG = rw.LoRAConfig(rank=2, target_modules=["query", "output.dense"])


def model_and_layers(merged: bool = False):
    model = randomise(rw.apply_lora(bert().eval(), CONFIG))
    if merged:
        rw.merge(model)
    return model, adapted(model)


def flags(model: nn.Module) -> list[tuple]:
    return [(x.merged, x.in_merged_model, x.adapters_enabled) for x in adapted(model).values()]


def assert_left_alone(model, before, wanted, flags_before):
    assert_unchanged(model, before)
    assert flags(model) == flags_before
    assert_same_bits(output(model).detach(), wanted, "output")


@pytest.mark.parametrize("operation", ["merge", "unmerge"])
@pytest.mark.parametrize("position", [0, 3, -1])
def test_a_computed_weight_is_refused_before_anything_is_done(operation, position, monkeypatch):
    model, layers = model_and_layers(merged=operation == "unmerge")
    name, layer = list(layers.items())[position]
    parametrizations.weight_norm(layer)
    before, wanted, flags_before = fingerprint(model), output(model).detach(), flags(model)
    started = []
    monkeypatch.setattr(Adapted, operation, lambda self: started.append(self))
    with pytest.raises(RuntimeError, match=rf"{name}: {operation}: .*parametrised \(WeightNorm\)"):
        getattr(rw, operation)(model)
    assert not started
    assert_left_alone(model, before, wanted, flags_before)
    monkeypatch.undo()
    parametrize.remove_parametrizations(layer, "weight")
    layer.weight = nn.Parameter(layer.weight, requires_grad=False)
    getattr(rw, operation)(model)


def test_a_pruned_layer_is_refused_and_forward_still_works():
    model, layers = model_and_layers()
    name, layer = list(layers.items())[2]
    prune.l1_unstructured(layer, "weight", amount=0.5)
    wanted = output(model).detach()
    with pytest.raises(RuntimeError, match=rf"{name}: merge: .*prune.remove\(layer, 'weight'\)"):
        rw.merge(model)
    assert_same_bits(output(model).detach(), wanted, "output")


def test_a_computed_weight_under_no_active_adapter_is_not_in_the_way():
    model, layers = model_and_layers()
    rw.add_adapter(model, "other", rw.LoRAConfig(rank=2, target_modules=["value"]))
    rw.activate_adapter(model, "other")
    randomise(model)
    query = next(layer for name, layer in layers.items() if name.endswith("query"))
    parametrizations.weight_norm(query)
    wanted = output(model).detach()
    rw.merge(model)
    torch.testing.assert_close(output(model), wanted, rtol=1e-4, atol=1e-5)
    rw.unmerge(model)
    assert_same_bits(output(model).detach(), wanted, "output")


@pytest.mark.parametrize("operation", ["merge", "unmerge"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError, ValueError])
def test_a_failure_in_the_middle_leaves_the_model(monkeypatch, operation, when, error):
    """Also one between a layer's merge and what the model notes of it."""
    model, layers = model_and_layers(merged=operation == "unmerge")
    before, wanted, flags_before = fingerprint(model), output(model).detach(), flags(model)
    original, bad = getattr(Adapted, operation), list(layers.values())[3]

    def fail(self):
        if self is bad and when == "before":
            raise error("in the middle")
        original(self)
        if self is bad:
            raise error("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr(Adapted, operation, fail)
        with pytest.raises(error, match="in the middle"):
            getattr(rw, operation)(model)
    assert_left_alone(model, before, wanted, flags_before)
    getattr(rw, operation)(model)


def test_running_out_of_memory_keeps_its_type_and_names_the_layer(monkeypatch):
    model, layers = model_and_layers()
    name = next(iter(layers))

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(rw.ops, "merged_weight", fail)
    with pytest.raises(torch.OutOfMemoryError, match=f"{name}: no memory"):
        rw.merge(model)
    assert not any(layer.merged for layer in layers.values())


def test_merging_inside_disable_adapters_counts_after_the_block():
    model, _ = model_and_layers()
    wanted = output(model).detach()
    with rw.disable_adapters(model):
        base = output(model).detach()
        rw.merge(model)
        assert_same_bits(output(model).detach(), base, "the base in the block")
    torch.testing.assert_close(output(model), wanted, rtol=1e-4, atol=1e-5)
    rw.unmerge(model)
    assert_same_bits(output(model).detach(), wanted, "unmerged output")


@pytest.mark.parametrize("compute", [parametrizations.orthogonal, parametrizations.weight_norm])
def test_summary_and_health_check_of_a_model_with_a_computed_weight(compute):
    model, layers = model_and_layers()
    name, layer = next(iter(layers.items()))
    compute(layer)
    parametrizations.weight_norm(layer, "lora_A")
    assert [x.name for x in rw.summary(model).layers] == list(layers)
    output(model.train()).square().mean().backward()
    assert rw.health_check(model).ok
    layer.parametrizations.lora_A.original1.grad = None
    problems = rw.health_check(model).problems
    assert problems == [f"{name}.parametrizations.lora_A.original1: no gradient; the layer took no "
                        "part in the step"]  # fmt: skip


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
@pytest.mark.parametrize("switch", [rw.activate_adapter, rw.delete_adapter])
def test_an_adapter_whose_factors_are_computed_is_not_switched_in_part(name, switch):
    model, layers = model_and_layers()
    rw.add_adapter(model, "other", CONFIG)
    path, layer = list(layers.items())[2]
    parametrizations.weight_norm(layer, name)
    before, wanted, flags_before = fingerprint(model), output(model).detach(), flags(model)
    target = "other" if switch is rw.activate_adapter else "default"
    with pytest.raises(ValueError, match=rf"{path}: .*layer's {name} is parametrised .*remove_par"):
        switch(model, target)
    assert_left_alone(model, before, wanted, flags_before)
    assert [x.adapter for x in layers.values()] == ["default"] * len(layers)
    parametrize.remove_parametrizations(layer, name)
    switch(model, target)
