# accelerate() on everything that holds PEFT layers: same outputs, all of PEFT's methods, and back.
import copy
import io
import pickle

import peft
import pytest
import torch
from peft_models import TOKENS, Tower, bert, calls, config, counted, fused, tower
from peft_of_transformers import needs_peft_of_transformers
from torch import nn

import rankwise as rw
import rankwise.integrations.peft as rp


def injected() -> nn.Module:
    return peft.inject_adapter_in_model(config(), Tower())


def mixed() -> nn.Module:
    model = peft.get_peft_model(Tower(), config(), mixed=True)
    model.add_adapter("other", peft.LoHaConfig(target_modules=["head"], init_weights=False))
    model.set_adapter(["default", "other"])
    return model


def wrapped() -> nn.Module:
    return nn.Sequential(tower())


@pytest.mark.parametrize("build", [tower, injected, mixed, wrapped])
def test_layers_run_on_the_operators_with_the_same_outputs_and_gradients(build):
    model = build()
    expected = model(TOKENS)
    expected.sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    state = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    model.zero_grad()
    rp.accelerate(model)
    with counted(model) as count:
        torch.testing.assert_close(model(TOKENS), expected)
    assert count == {"fused": 3}
    model(TOKENS).sum().backward()
    assert state == {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name])


@needs_peft_of_transformers
def test_transformers_adapters():
    model = bert()
    model.add_adapter(config(target_modules=["query", "value", "word_embeddings"]))
    expected = model(TOKENS).logits
    rp.accelerate(model)
    with counted(model) as count:
        torch.testing.assert_close(model(TOKENS).logits, expected)
    assert count == {"fused": 5}
    model.add_adapter(config(target_modules=["key", "query"]), "other")
    with counted(model) as count:
        model(TOKENS)
    assert count["fused"] == 4 and isinstance(fused(model).popitem()[1], nn.Module)
    rp.restore(model)
    assert not fused(model) and not model._forward_pre_hooks


def test_layers_added_later_are_taken():
    model = tower()
    rp.accelerate(model)
    model.add_adapter("other", config(target_modules=["head", "first"]))
    model.set_adapter("other")
    with counted(model) as count:
        model(TOKENS)
    assert count == {"fused": 2, "no active adapter": 2}
    folder_model = injected()
    rp.accelerate(folder_model)
    peft.inject_adapter_in_model(config(target_modules=["head"]), folder_model, "other")
    folder_model(TOKENS)
    assert len(fused(folder_model)) == 4


def test_adapters_loaded_from_a_folder(tmp_path):
    source = tower(target_modules=["head"])
    source.save_pretrained(tmp_path)
    model = tower()
    rp.accelerate(model)
    model.load_adapter(tmp_path, "read")
    model.set_adapter("read")
    with counted(model) as count:
        model(TOKENS)
    assert count["fused"] == 1 and len(fused(model)) == 4


def test_twice_is_once():
    model = tower()
    first, second = rp.accelerate(model), rp.accelerate(model)
    assert str(first) == str(second)
    with counted(model) as count:
        model(TOKENS)
    assert count == {"fused": 3}
    injected_model = injected()
    rp.accelerate(injected_model)
    rp.accelerate(injected_model)
    assert len(injected_model._forward_pre_hooks) == 1


@pytest.mark.parametrize("build", [tower, injected, mixed, wrapped])
def test_restore_leaves_nothing(build):
    def looks(model):
        return {
            name: (type(module), sorted(vars(module)), len(module._forward_pre_hooks))
            for name, module in model.named_modules()
        }

    model = build()
    before, expected = looks(model), model(TOKENS)
    report = rp.accelerate(model)
    assert looks(model) != before
    model(TOKENS)
    report.restore()
    assert looks(model) == before
    assert torch.equal(model(TOKENS), expected)
    rp.restore(model)


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch_save,
}


@pytest.mark.parametrize("build", [tower, injected, mixed])
@pytest.mark.parametrize("way", COPIES)
def test_copies_are_accelerated_and_count_for_themselves(build, way):
    model = build()
    rp.accelerate(model)
    expected = model(TOKENS)
    copied = COPIES[way](model)
    assert calls(copied) == {}
    assert torch.equal(copied(TOKENS), expected)
    assert calls(copied) == calls(model) == {"fused": 3}
    for parameter in copied.parameters():
        parameter.data.zero_()
    assert torch.equal(model(TOKENS), expected)
    rp.restore(copied)
    assert not fused(copied) and fused(model)


def test_methods_of_peft():
    model = tower()
    rp.accelerate(model)
    expected, base = model(TOKENS), model.get_base_model()
    with model.disable_adapter():
        plain = model(TOKENS)
    model.merge_adapter()
    torch.testing.assert_close(model(TOKENS), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(model(TOKENS), expected)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(plain, expected)
    model.add_adapter("other", config(target_modules=["embed", "first", "second"]))
    model.base_model.set_adapter(["default", "other"])
    both = model(TOKENS)
    assert calls(model)["fused"] == 9 and calls(model)["merged"] == calls(model)["disabled"] == 3
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    linears = [layer for name, layer in fused(model).items() if "embed" not in name]
    assert all(layer.active_adapters == ["sum"] for layer in linears)
    torch.testing.assert_close(model(TOKENS), both)
    model.delete_adapter("other")
    model.set_adapter("default")
    torch.testing.assert_close(model(TOKENS), expected)
    assert base is model.get_base_model()
    torch.testing.assert_close(model.merge_and_unload()(TOKENS), expected)


def test_adapter_names_in_a_batch():
    model = tower(target_modules=["first", "second"]).eval()
    model.add_adapter("other", config(target_modules=["first"]))
    names = ["default", "other", "__base__", "default"]
    expected = model(TOKENS, adapter_names=names)
    rp.accelerate(model)
    with counted(model) as count:
        torch.testing.assert_close(model(TOKENS, adapter_names=names), expected)
    assert count == {"arguments": 2}


def test_a_plain_model_is_refused():
    with pytest.raises(ValueError, match="no PEFT layer: .*rankwise.apply_lora"):
        rp.accelerate(Tower())
    with pytest.raises(ValueError, match="no PEFT layer"):
        rp.accelerate(rw.apply_lora(Tower(), rw.LoRAConfig(target_modules=["first"])))


@pytest.mark.parametrize("build", [tower, injected, mixed])
def test_apply_lora_on_peft_layers_points_here(build):
    model = build()
    for targets in ("all-linear", ["first"], ".*first.*"):
        chosen = rw.LoRAConfig(target_modules=targets)
        with pytest.raises(ValueError, match="rankwise.integrations.peft.accelerate"):
            rw.apply_lora(model, chosen)
    rp.accelerate(model)
    with pytest.raises(ValueError, match="rankwise.integrations.peft.accelerate"):
        rw.apply_lora(model, chosen)
    assert not any(isinstance(module, rw.nn.LoRALinear) for module in model.modules())


def test_apply_lora_beside_peft_layers():
    model = tower(target_modules=["first"])
    rw.apply_lora(model, rw.LoRAConfig(target_modules=["second"]))
    assert isinstance(model.base_model.model.second, rw.nn.LoRALinear)


def test_compiled_whole():
    model = tower()
    rp.accelerate(model)
    expected = model(TOKENS)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(TOKENS), expected)
    model.add_adapter("other", config())
    model.set_adapter("other")
    torch.testing.assert_close(compiled(TOKENS), model(TOKENS))


def test_rankwise_needs_no_peft():
    import subprocess
    import sys

    hide = "import sys; sys.modules['peft'] = None; import rankwise"
    plain = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True)
    assert plain.returncode == 0, plain.stderr
    wanted = f"{hide}; import rankwise.integrations.peft"
    told = subprocess.run([sys.executable, "-c", wanted], capture_output=True, text=True)
    assert "pip install peft" in told.stderr
