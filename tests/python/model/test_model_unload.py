# unload(model): exactly the plain model again, merged or not, with hooks, ties and identities.
import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from small_models import BUILDERS, bert_classifier, llama, output, randomise, sequence, small
from tolerances import assert_same_bits
from torch import nn

import rankwise as rw

CONFIG = rw.LoRAConfig(rank=2, target_modules=["query", "dense", "word_embeddings"])


def assert_plain(model: nn.Module, plain: nn.Module) -> None:
    """The same classes, names and attributes, and nothing of ours."""
    modules, wanted = (dict(m.named_modules(remove_duplicate=False)) for m in (model, plain))
    assert list(modules) == list(wanted)
    for name, module in modules.items():
        assert type(module) is type(wanted[name]), name
        assert vars(module).keys() == vars(wanted[name]).keys(), name
        for key, value in vars(wanted[name]).items():
            if "hooks" in key:
                assert len(vars(module)[key]) == len(value), f"{name}.{key}"
            elif isinstance(value, (int, str, tuple, type(None))) and key != "training":
                assert vars(module)[key] == value, f"{name}.{key}"
    assert list(model.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("architecture", BUILDERS)
def test_the_plain_model_is_back(architecture, merged):
    plain = BUILDERS[architecture]().eval().requires_grad_(False)
    base = output(plain).detach()
    model = copy.deepcopy(plain)
    rw.apply_lora(model, rw.LoRAConfig(rank=2, target_modules="all-linear"))
    randomise(model)
    parameters = {id(p) for p in model.parameters()}
    if merged:
        rw.merge(model)
        base = output(model).detach()
        parameters = {id(p) for p in model.parameters()}
    assert rw.unload(model) is model
    assert_plain(model, plain)
    assert {id(p) for p in model.parameters()} <= parameters
    assert_same_bits(output(model).detach(), base, "output")
    assert not any(p.requires_grad for p in model.parameters())
    plain.load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize("merged", [False, True])
def test_modules_trained_whole_go_with_the_weights(merged):
    plain = bert_classifier().eval()
    model = copy.deepcopy(plain)
    originals = dict(model.named_modules())
    config = rw.LoRAConfig(rank=2, target_modules=["query"], modules_to_save=["classifier"])
    randomise(rw.apply_lora(model, config))
    trained = model.classifier
    rw.add_adapter(model, "other", config)
    if merged:
        rw.merge(model)
    wanted = output(model).detach() if merged else output(plain).detach()
    rw.unload(model)
    assert model.classifier is (trained if merged else originals["classifier"])
    assert_plain(model, plain)
    assert_same_bits(output(model).detach(), wanted, "output")
    assert model.classifier.weight.requires_grad is merged


def test_adapters_can_be_applied_again():
    model = small(modules_to_save=[])
    rw.add_adapter(model, "other", rw.LoRAConfig(rank=3, target_modules=["0"]))
    rw.merge(model)
    x = torch.randn(3, 8)
    wanted = model.eval()(x).detach()
    rw.unload(model)
    assert rw.adapter_names(rw.apply_lora(model, rw.LoRAConfig(target_modules=["2"]))) == [
        "default"
    ]
    torch.testing.assert_close(model(x), wanted)
    model(x).sum().backward()
    rw.unload(model)
    assert_same_bits(model(x).detach(), wanted, "the base again")
    with pytest.raises(ValueError, match="the model has no adapters"):
        rw.unload(model)


@pytest.mark.parametrize("merged", [False, True])
def test_hooks_and_their_handles_go_on_working(merged):
    model, calls = sequence(), []

    def note(name):
        return lambda *args, **kwargs: calls.append(name)

    before = [
        model[0].register_forward_pre_hook(note("pre")),
        model[0].register_forward_hook(note("forward")),
        model[0].register_full_backward_hook(note("backward")),
        model[0].register_load_state_dict_pre_hook(note("load pre")),
        model[0].register_state_dict_pre_hook(note("state pre")),
    ]
    randomise(rw.apply_lora(model, rw.LoRAConfig(target_modules=["0", "2"])))
    after = [
        model[0].register_forward_hook(note("late")),
        model[0].register_load_state_dict_post_hook(note("load post")),
        model[0].register_state_dict_post_hook(note("state post")),
    ]
    if merged:
        rw.merge(model)
    rw.unload(model).requires_grad_(True)
    names = ["pre", "forward", "late", "backward", "state pre", "state post"]
    names += ["load pre", "load post"]

    def use():
        calls.clear()
        model(torch.randn(2, 8, requires_grad=True)).sum().backward()
        model.load_state_dict(model.state_dict())
        return calls

    assert use() == names
    for handle in before + after:
        handle.remove()
    assert use() == []


def test_a_load_hook_is_given_the_layer_that_is_in_place():
    model, modules = sequence(), []
    model[0].register_load_state_dict_pre_hook(lambda module, *args: modules.append(module))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    rw.apply_lora(model, rw.LoRAConfig(target_modules=["0"]))
    model.load_state_dict(state)
    adapted_layer = model[0]
    rw.unload(model)
    model.load_state_dict(state)
    assert modules[0] is adapted_layer and modules[1] is model[0]


def test_a_layer_at_two_places_stays_one():
    linear = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": linear, "b": nn.Sequential(linear, nn.Linear(8, 8))})
    rw.apply_lora(model, rw.LoRAConfig(rank=2, target_modules=["a"]))
    rw.merge(model)
    rw.unload(model)
    assert type(model["a"]) is nn.Linear and model["a"] is model["b"][0]


def test_tied_weights_are_tied_after():
    model = llama(tied=True).eval()
    rw.apply_lora(model, rw.LoRAConfig(rank=2, target_modules="all-linear"))
    rw.unload(randomise(model))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("training", [False, True])
def test_modes_are_kept(training):
    model = small().train(training)
    model[2].train(not training)
    rw.unload(model)
    assert [m.training for m in model] == [training, training, not training]


def test_the_unloaded_model_is_pickled_without_this_library(tmp_path):
    model = small().eval()
    rw.merge(model)
    rw.unload(model)
    model(torch.ones(1, 8))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    assert b"rankwise" not in buffer.getvalue() and b"rankwise" not in pickle.dumps(model)
    torch.save((model, model(torch.ones(1, 8)).detach()), tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        f"model, wanted = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "assert torch.equal(model(torch.ones(1, 8)), wanted)\n"
        "assert not any(name.startswith('rankwise') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("nested", [False, True])
def test_a_transformer_encoder_takes_nested_tensors_again(nested):
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    plain = copy.deepcopy(model)
    rw.apply_lora(model, rw.LoRAConfig(rank=2, target_modules=["linear1", "linear2"]))
    assert not model.use_nested_tensor
    rw.unload(copy.deepcopy(model))
    rw.unload(model)
    assert model.use_nested_tensor is nested
    assert_plain(model, plain)


def test_layers_put_in_by_hand_and_a_wrapper_of_the_model():
    hand = nn.Sequential(rw.nn.AdaLoRALinear(8, 8), rw.nn.LoRALinear(8, 8))
    rw.unload(hand)
    assert [type(m) for m in hand] == [nn.Linear, nn.Linear]
    inner = small(modules_to_save=[])
    rw.merge(inner)
    rw.unload(nn.Sequential(inner))
    assert_plain(inner, sequence())


def test_one_layer():
    layer = rw.nn.LoRAEmbedding(9, 4, padding_idx=2)
    plain = layer.unload()
    assert type(plain) is nn.Embedding and plain.weight is layer.weight and plain.padding_idx == 2
    assert vars(plain).keys() == vars(nn.Embedding(9, 4)).keys()
    with pytest.raises(ValueError, match=r"itself is an adapted layer.*layer.unload\(\)"):
        rw.unload(rw.nn.LoRALinear(8, 8))
