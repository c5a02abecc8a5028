# Adapters of a part of a model, seen from the whole model and the reverse: one truth, in the tree.
import copy

import pytest
import torch
from safetensors.torch import load_file
from small_models import bert_classifier, output, randomise
from tolerances import assert_same_bits
from torch import nn

import rankwise as rw
from rankwise.config import LoRAConfig

CONFIG = LoRAConfig(rank=2, target_modules=["0"], modules_to_save=["2"])
X = torch.linspace(-1, 1, 24).view(3, 8)


def part(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).eval()


def pair() -> tuple[nn.Module, nn.Module]:
    """(plain, with one adapter in each of its two parts, trained)."""
    plain = nn.ModuleDict({"a": part(1), "b": part(2)})
    model = copy.deepcopy(plain)
    for inner in model.values():
        rw.apply_lora(inner, CONFIG)
    return plain, randomise(model)


def keys(model: nn.Module, path) -> set[str]:
    rw.save_adapter(model, path)
    return {
        key.removeprefix("base_model.model.")
        for key in load_file(path / "adapter_model.safetensors")
    }


OWN = {"0.lora_A.weight", "0.lora_B.weight", "2.weight", "2.bias"}


def outputs(model: nn.Module) -> torch.Tensor:
    return torch.stack([inner(X) for inner in model.values()]).detach()


def test_the_whole_saves_what_its_part_trains(tmp_path):
    model = nn.ModuleDict({"part": part(), "rest": nn.Linear(8, 8)})
    rw.apply_lora(model["part"], CONFIG)
    assert keys(model, tmp_path / "whole") == {f"part.{key}" for key in OWN}
    assert keys(model["part"], tmp_path / "part") == OWN


def test_a_part_saves_what_the_whole_trains_in_it(tmp_path):
    model = nn.ModuleDict({"part": part(), "rest": nn.Linear(8, 8)})
    config = LoRAConfig(rank=2, target_modules=["0"], modules_to_save=["2", "rest"])
    rw.apply_lora(model, config)
    assert keys(model["part"], tmp_path / "part") == OWN
    assert keys(model, tmp_path / "whole") == {
        *(f"part.{key}" for key in OWN),
        *("rest.weight", "rest.bias"),
    }


def test_disabling_the_whole_is_disabling_its_parts():
    plain, model = pair()
    wanted = outputs(model)
    with rw.disable_adapters(model):
        assert_same_bits(outputs(model), outputs(plain), "inside")
        with rw.disable_adapters(model["a"]):
            pass
        assert_same_bits(outputs(model), outputs(plain), "after the inner block")
        rw.activate_adapter(model["a"], None)
        rw.activate_adapter(model["a"], "default")
        assert_same_bits(outputs(model), outputs(plain), "after a switch")
    assert_same_bits(outputs(model), wanted, "after")
    with rw.disable_adapters(model["a"]):
        assert_same_bits(outputs(model)[0], outputs(plain)[0], "the part")
        assert_same_bits(outputs(model)[1], wanted[1], "the other part")
    assert_same_bits(outputs(model), wanted, "after the part's block")


def test_a_part_disabled_where_the_whole_was_adapted():
    model = bert_classifier().eval()
    plain = copy.deepcopy(model)
    config = LoRAConfig(rank=2, target_modules=["query"], modules_to_save=["pooler", "classifier"])
    randomise(rw.apply_lora(model, config))
    wanted = output(model).detach()
    with rw.disable_adapters(model.bert):
        assert_same_bits(
            output(model.bert).detach(), output(plain.bert).detach(), "output of the part"
        )
        assert (
            model.classifier.weight.requires_grad and not model.bert.pooler.dense.bias.requires_grad
        )
    assert_same_bits(output(model).detach(), wanted, "after")


def test_switching_merging_and_deleting_in_the_whole():
    plain, model = pair()
    wanted = outputs(model)
    rw.activate_adapter(model, None)
    assert_same_bits(outputs(model), outputs(plain), "the base")
    rw.activate_adapter(model["a"], "default")
    rw.activate_adapter(model["b"], "default")
    assert_same_bits(outputs(model), wanted, "each part switched")
    assert len(rw.merge(model)) == 2
    torch.testing.assert_close(outputs(model), wanted)
    rw.unmerge(model)
    assert len(rw.summary(model).layers) == 2 and rw.adapter_names(model) == ["default"]
    rw.delete_adapter(model, "default")
    assert_same_bits(outputs(model), outputs(plain), "after deleting")
    assert rw.adapter_names(model) == rw.adapter_names(model["a"]) == []


def test_the_whole_saved_and_loaded(tmp_path):
    plain, model = pair()
    wanted = outputs(model)
    assert keys(model, tmp_path) == {f"{name}.{key}" for name in "ab" for key in OWN}
    rw.load_adapter(plain, tmp_path)
    assert_same_bits(outputs(plain), wanted, "into a plain model")
    rw.activate_adapter(model, None)
    rw.load_adapter(model, tmp_path)
    assert_same_bits(outputs(model), wanted, "into the parts' own")
    rw.load_adapter(model, tmp_path, name="other")
    assert_same_bits(outputs(model), wanted, "beside them")
    assert set(rw.adapter_names(model["a"])) == {"default", "other"}
    rw.activate_adapter(model["b"], "default")
    with pytest.raises(ValueError, match=r"different adapters, \['default', 'other'\]"):
        rw.save_adapter(model, tmp_path)
    rw.save_adapter(model, tmp_path, "other")


@pytest.mark.parametrize("whole", [True, False])
def test_a_part_that_was_unloaded_is_no_loss(tmp_path, whole):
    _, model = pair()
    if whole:
        model = nn.ModuleDict({"a": part(1), "b": part(2)})
        rw.apply_lora(model, LoRAConfig(rank=2, target_modules=["0"], modules_to_save=["2"]))
    wanted = outputs(model)[1]
    rw.unload(model["a"])
    assert keys(model, tmp_path) == {f"b.{key}" for key in OWN}
    assert rw.summary(model).replaced == {}
    assert_same_bits(outputs(model)[1], wanted, "the other part")
    rw.activate_adapter(model, None)
    rw.activate_adapter(model, "default")


def test_health_is_asked_of_every_part():
    _, model = pair()
    model["a"](X).sum().backward()
    found = {problem.split(":")[0] for problem in rw.health_check(model).problems}
    assert found == {"b.0.lora_A", "b.0.lora_B", "b.2.weight", "b.2.bias"}


@pytest.mark.parametrize("inner_first", [True, False])
def test_modules_trained_whole_in_each_other_for_two_adapters_are_refused(inner_first):
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "head": part()})
    names = ["head.2", "head"] if inner_first else ["head", "head.2"]
    first, second = (LoRAConfig(target_modules=["body"], modules_to_save=[n]) for n in names)
    rw.apply_lora(model, first, "a")
    with pytest.raises(ValueError, match=r"modules_to_save: 'head.2' is in 'head', and two"):
        rw.add_adapter(model, "b", second)


def test_modules_trained_whole_in_each_other_for_one_adapter_are_one(tmp_path):
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "head": part()})
    config = LoRAConfig(target_modules=["body"], modules_to_save=["head.2", "head"])
    rw.apply_lora(model, config)
    rw.save_adapter(model, tmp_path)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"head.0.weight", "head.2.weight", "head.2.bias"} < trained
    with rw.disable_adapters(model):
        assert not any(p.requires_grad for p in model["head"].parameters())
