# disable_adapters: within the block the base, merged or not; afterwards everything as before.
import copy

import pytest
import torch
from small_models import assert_unchanged, bert_classifier, fingerprint, output, randomise
from tolerances import assert_same_bits
from torch import nn

import rankwise as rw
from rankwise.config import LoRAConfig

CONFIG = LoRAConfig(rank=2, target_modules=["query", "dense"], modules_to_save=["classifier"])


@pytest.fixture
def models() -> tuple[nn.Module, nn.Module]:
    """(plain model, adapted with random values)."""
    plain = bert_classifier().eval()
    return plain, randomise(rw.apply_lora(copy.deepcopy(plain), CONFIG))


def base_of(plain: nn.Module) -> torch.Tensor:
    return output(plain).detach()


def test_the_base_inside_and_the_adapter_after(models):
    plain, model = models
    wanted, before = output(model).detach(), fingerprint(model)
    with rw.disable_adapters(model) as same:
        assert same is model
        assert_same_bits(output(model).detach(), base_of(plain), "inside")
    assert_same_bits(output(model).detach(), wanted, "after")
    assert_unchanged(model, before)


def test_merged_models_compute_the_base_inside_too(models):
    plain, model = models
    rw.merge(model)
    wanted = output(model).detach()
    with rw.disable_adapters(model):
        assert_same_bits(output(model).detach(), base_of(plain), "inside")
    assert_same_bits(output(model).detach(), wanted, "after")


def test_nested_blocks_stay_disabled_until_the_outermost_ends(models):
    plain, model = models
    wanted = output(model).detach()
    with rw.disable_adapters(model):
        with rw.disable_adapters(model):
            assert_same_bits(output(model).detach(), base_of(plain), "inside both")
        assert_same_bits(output(model).detach(), base_of(plain), "inside the outer one")
    assert_same_bits(output(model).detach(), wanted, "after")


def test_an_exception_inside_passes_and_enables(models):
    _, model = models
    wanted, before = output(model).detach(), fingerprint(model)
    with pytest.raises(ZeroDivisionError), rw.disable_adapters(model):
        raise ZeroDivisionError
    with (
        pytest.raises(ZeroDivisionError),
        rw.disable_adapters(model),
        rw.disable_adapters(model),
    ):
        raise ZeroDivisionError
    assert_same_bits(output(model).detach(), wanted, "after")
    assert_unchanged(model, before)


def test_a_layer_switched_off_by_hand_stays_off(models):
    _, model = models
    layer = model.bert.encoder.layer[0].attention.self.query
    layer.adapters_enabled = False
    with rw.disable_adapters(model):
        pass
    assert not layer.adapters_enabled
    assert model.bert.encoder.layer[1].attention.self.query.adapters_enabled


def test_with_every_layer_off_by_hand_the_whole_modules_come_back(models):
    _, model = models
    for layer in model.modules():
        if isinstance(layer, rw.nn.LoRALinear):
            layer.adapters_enabled = False
    before = fingerprint(model)
    with rw.disable_adapters(model):
        pass
    assert_unchanged(model, before)


def test_a_switch_inside_takes_effect_after_the_block(models):
    plain, model = models
    rw.add_adapter(model, "b", CONFIG)
    rw.activate_adapter(model, "b")
    randomise(model, seed=9)
    wanted = output(model).detach()
    rw.activate_adapter(model, "default")
    with rw.disable_adapters(model):
        rw.activate_adapter(model, "b")
        assert_same_bits(output(model).detach(), base_of(plain), "inside")
    assert_same_bits(output(model).detach(), wanted, "after")


def test_an_adapter_added_or_deleted_inside(models):
    plain, model = models
    with rw.disable_adapters(model):
        rw.add_adapter(model, "b", LoRAConfig(rank=2, target_modules=["key"]))
        rw.activate_adapter(model, "b")
        randomise(model)
        assert_same_bits(output(model).detach(), base_of(plain), "inside")
        rw.delete_adapter(model, "default")
    assert rw.adapter_names(model) == ["b"]
    assert not torch.equal(output(model), base_of(plain))


def test_as_reference_model_of_preference_training(models):
    """Gradients flow through the adapted pass alone; the base's pass is inside the block."""
    _, model = models
    model.train()
    policy = output(model)
    with rw.disable_adapters(model), torch.no_grad():
        reference = output(model)
    (policy - reference).square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert "classifier.weight" in gradients
    assert all(g is not None and g.abs().sum() > 0 for g in gradients.values())
