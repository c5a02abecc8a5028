# What unload(model) refuses, and who is told that a model was unloaded.
import pytest
import torch
from processes import run_processes
from sharded_models import WAYS, sharded
from small_models import adapted, assert_unchanged, fingerprint, sequence, small
from torch import nn
from torch.nn.utils import parametrizations, prune

import rankwise as rw


def refused(model, match):
    before = fingerprint(model)
    with pytest.raises(RuntimeError, match=match):
        rw.unload(model)
    assert_unchanged(model, before)
    assert adapted(model)


def test_a_model_that_is_merged_in_part_is_refused():
    model = small()
    model[2].merge()
    refused(model, r"'2' is merged and '0' is not; call merge\(model\) or unmerge\(model\)")


def test_within_disable_adapters_it_is_refused():
    model = small()
    with rw.disable_adapters(model):
        refused(model, r"the adapters are disabled; leave disable_adapters\(\)")
    rw.unload(model)


@pytest.mark.parametrize("name", ["weight", "bias", "lora_A"])
def test_a_parametrised_layer_is_refused_by_name(name):
    model = small()
    parametrizations.spectral_norm(model[2], name) if name != "bias" else (
        nn.utils.parametrize.register_parametrization(model[2], name, nn.Tanh())
    )
    refused(model, rf"2: unload: the layer's {name} is parametrised .*remove_parametrizations")
    nn.utils.parametrize.remove_parametrizations(model[2], name)
    rw.unload(model)


def test_a_pruned_factor_is_refused_and_a_pruned_weight_stays_pruned():
    model = small()
    prune.l1_unstructured(model[2], "lora_B", amount=0.5)
    refused(model, r"2: unload: the layer's lora_B is computed.*prune.remove\(layer, 'lora_B'\)")
    prune.remove(model[2], "lora_B")
    prune.l1_unstructured(model[2], "weight", amount=0.5)
    rw.unload(model)
    assert type(model[2]) is nn.Linear and prune.is_pruned(model[2])
    model[2](torch.randn(2, 8))
    assert (model[2].weight == 0).sum() == 32


def test_a_forward_put_on_the_instance_is_refused():
    model = small()
    model[0].forward = model[0].forward
    refused(model, "0: unload: the layer's forward was replaced on the instance")


def test_an_attached_allocator_says_that_the_model_was_unloaded():
    model = sequence()
    config = rw.AdaLoRAConfig(target_modules=["0", "2"], total_steps=10)
    rw.apply_lora(model, config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    handle = rw.RankAllocator(model, config).attach(optimizer)
    model(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    rw.unload(model)
    with pytest.raises(RuntimeError, match=r"the model was unloaded.*remove\(\)"):
        optimizer.step()
    handle.remove()
    optimizer.step()


def test_a_sharded_model_is_refused_by_name():
    run_processes(_is_refused, 2)


def _is_refused(rank: int) -> None:
    for way in WAYS:
        model = sharded(way)
        before, classes = fingerprint(model), [type(m) for m in model.modules()]
        with pytest.raises(ValueError, match="up: unload: weight must be whole .* DTensor"):
            rw.unload(model)
        assert [type(m) for m in model.modules()] == classes
        assert fingerprint(model).parameters == before.parameters
