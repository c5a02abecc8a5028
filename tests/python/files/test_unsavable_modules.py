# Modules that files could not name, and whole modules in exports: said before, not after training.
import warnings

import pytest
import torch
from torch import nn

import rankwise as rw


def block() -> nn.ModuleDict:
    return nn.ModuleDict({"fc": nn.Linear(4, 4), "head": nn.Linear(4, 2)})


def model(name: str) -> nn.Sequential:
    whole = nn.Sequential(nn.Linear(4, 4))
    whole.add_module(name, block())
    return whole


@pytest.mark.parametrize("name", ["lora_block", "lora_A", "lora_"])
@pytest.mark.parametrize("inside", ["", ".head", ".fc"])
def test_a_module_whose_tensors_would_be_taken_for_factors_is_refused(name, inside):
    net = model(name)
    before = list(net.modules())
    config = rw.LoRAConfig(target_modules=["0"], modules_to_save=[name + inside])
    with pytest.raises(ValueError, match=f"modules_to_save: '{name}{inside}' .* not saved.*rename"):
        rw.apply_lora(net, config)
    assert list(net.modules()) == before and all(p.requires_grad for p in net.parameters())
    rw.apply_lora(net, rw.LoRAConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match=f"modules_to_save: '{name}{inside}' .* not saved"):
        rw.add_adapter(net, "other", config)
    assert rw.adapter_names(net) == ["default"]


def test_so_is_one_that_has_factors_of_its_own():
    net = model("block")
    net.block.head.lora_A = nn.Parameter(torch.zeros(2, 4))
    config = rw.LoRAConfig(target_modules=["0"], modules_to_save=["head"])
    with pytest.raises(ValueError, match="its tensor 'block.head.lora_A' means a LoRA factor"):
        rw.apply_lora(net, config)


@pytest.mark.parametrize("name", ["my_lora_block", "xlora_", "block"])
def test_others_are_saved_and_loaded(tmp_path, name):
    config = rw.LoRAConfig(target_modules=["0"], modules_to_save=[f"{name}.head"])
    net = rw.apply_lora(model(name), config)
    rw.save_adapter(net, tmp_path)
    other = model(name)
    rw.load_adapter(other, tmp_path)
    assert torch.equal(other.get_submodule(name).head.weight, net.get_submodule(name).head.weight)


@pytest.mark.parametrize("name", ["lora_block", "lora_A"])
def test_layers_to_adapt_may_be_in_such_a_module(tmp_path, name):
    net = rw.apply_lora(model(name), rw.LoRAConfig(target_modules=["fc"]))
    nn.init.normal_(net.get_submodule(name).fc.lora_B)
    rw.save_adapter(net, tmp_path)
    other = model(name)
    rw.load_adapter(other, tmp_path)
    assert torch.equal(other.get_submodule(name).fc.lora_B, net.get_submodule(name).fc.lora_B)


def test_an_export_with_whole_modules_warns_once_and_others_do_not(tmp_path):
    config = rw.LoRAConfig(target_modules=["0"], modules_to_save=["block.head"])
    net = rw.apply_lora(model("block"), config)
    with pytest.warns(UserWarning) as caught:
        rw.export_lora(net, tmp_path / "whole")
    (message,) = (str(x.message) for x in caught)
    assert message.startswith("export_lora") and "(block.head)" in message
    assert "vLLM" in message and "llama.cpp" in message
    assert caught[0].filename == __file__
    rw.add_adapter(net, "plain", rw.LoRAConfig(target_modules=["0"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rw.export_lora(net, tmp_path / "plain", name="plain")
        rw.save_adapter(net, tmp_path / "saved")
