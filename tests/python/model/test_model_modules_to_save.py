# modules_to_save: trained whole, switched with the adapter, and the base's module kept bit for bit.
import copy

import pytest
import torch
from small_models import adapted, assert_base_bits, bert_classifier, loss, output, randomise
from tolerances import assert_same_bits
from torch import nn

import rankwise as rw
from rankwise.config import LoRAConfig

HEAD = LoRAConfig(rank=2, target_modules=["query", "value"], modules_to_save=["classifier"])
PLAIN = LoRAConfig(rank=3, target_modules=["key"])


def with_heads(*names: str) -> tuple[nn.Module, nn.Module]:
    """(plain model, the model with an adapter of each name and random values), float64, eval."""
    plain = bert_classifier().double().eval()
    model = rw.apply_lora(copy.deepcopy(plain), HEAD, names[0])
    for name in names[1:]:
        rw.add_adapter(model, name, HEAD)
    for seed, name in enumerate(names):
        rw.activate_adapter(model, name)
        randomise(model, seed)
    return plain, model


def test_the_module_trains_and_starts_as_the_bases():
    plain = bert_classifier()
    model = rw.apply_lora(copy.deepcopy(plain), HEAD)
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n}
    assert trained == {"classifier.weight", "classifier.bias"}
    assert_base_bits(model, plain.state_dict())


def test_training_it_leaves_the_bases_module():
    plain, model = with_heads("default")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    assert not torch.equal(model.classifier.weight, plain.classifier.weight)
    rw.activate_adapter(model, None)
    assert_base_bits(model, plain.state_dict())
    assert_same_bits(output(model).detach(), output(plain).detach(), "output of the base")
    assert not any(p.requires_grad for p in model.parameters())


def test_each_adapter_has_its_own():
    plain, model = with_heads("a", "ab", "b")
    outputs, heads = {}, {}
    for name in ("a", "ab", "b", None):
        rw.activate_adapter(model, name)
        outputs[name] = output(model).detach()
        heads[name] = model.classifier.weight.detach().clone()
    assert len({tuple(h.flatten().tolist()) for h in heads.values()}) == 4
    for name in ("b", "a", None, "ab", "b"):
        rw.activate_adapter(model, name)
        assert_same_bits(model.classifier.weight.detach(), heads[name], f"head of {name}")
        assert_same_bits(output(model).detach(), outputs[name], f"output of {name}")
        assert model.classifier.weight.requires_grad == (name is not None)
    assert_same_bits(outputs[None], output(plain).detach(), "base")


def test_an_adapter_without_it_uses_the_bases():
    plain, model = with_heads("default")
    rw.add_adapter(model, "plain", PLAIN)
    rw.activate_adapter(model, "plain")
    assert_same_bits(model.classifier.weight, plain.classifier.weight, "classifier")
    assert not model.classifier.weight.requires_grad
    randomise(model)
    rw.activate_adapter(model, None)
    assert_base_bits(model, plain.state_dict())


def test_a_later_adapter_starts_from_the_bases_module_not_the_active_ones():
    plain, model = with_heads("a")
    rw.add_adapter(model, "b", HEAD)
    rw.activate_adapter(model, "b")
    assert_same_bits(model.classifier.weight, plain.classifier.weight, "classifier")


def test_deleting_gives_the_bases_back_and_adding_again_is_fresh():
    plain, model = with_heads("a")
    rw.delete_adapter(model, "a")
    assert_base_bits(model, plain.state_dict())
    rw.add_adapter(model, "a", HEAD)
    rw.activate_adapter(model, "a")
    assert_same_bits(output(model).detach(), output(plain).detach(), "output of the fresh adapter")


@pytest.mark.parametrize("training", [True, False])
def test_the_training_flag_is_that_of_the_model(training):
    _, model = with_heads("a", "b")
    model.train(training)
    for name in ("a", None, "b"):
        rw.activate_adapter(model, name)
        assert {m.training for m in model.modules()} == {training}


def test_a_move_of_the_model_reaches_modules_that_wait():
    plain, model = with_heads("a", "b")
    model.float()
    for name in ("a", None, "b"):
        rw.activate_adapter(model, name)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        output(model)
    rw.activate_adapter(model, None)
    assert_base_bits(model, {k: v.float() for k, v in plain.state_dict().items()})


class Head(nn.Module):
    """A head of two dtypes, as transformers keeps normalisation in float32 over a 16-bit model."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(6, 6, dtype=torch.bfloat16)
        self.norm = nn.LayerNorm(6, dtype=torch.float32)
        self.register_buffer("scale", torch.tensor([1 + 2.0**-20]))

    def forward(self, x):
        return self.norm(self.dense(x).float()) * self.scale


def test_a_module_of_two_dtypes_keeps_both_through_switches():
    model = nn.ModuleDict({"body": nn.Linear(6, 6, dtype=torch.bfloat16), "head": Head()})
    with torch.no_grad():
        model["head"].norm.weight.normal_()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rw.apply_lora(model, LoRAConfig(target_modules=["body"], modules_to_save=["head"]))
    for name in ("default", None, "default", None):
        rw.activate_adapter(model, name)
        assert_base_bits(model, before)


def test_a_switch_keeps_submodules_that_are_in_evaluation_on_purpose():
    model = nn.ModuleDict({"body": nn.Linear(6, 6), "head": nn.Sequential(nn.BatchNorm1d(6))})
    rw.apply_lora(model, LoRAConfig(target_modules=["body"], modules_to_save=["head"]))
    model.train()
    model["head"][0].eval()  # frozen statistics
    rw.activate_adapter(model, None)
    rw.activate_adapter(model, "default")
    assert not model["head"][0].training


def test_one_adapter_trains_whole_what_another_adapts():
    plain, model = with_heads("whole")
    config = LoRAConfig(rank=2, target_modules=["key", "classifier"])
    try:
        rw.add_adapter(model, "low", config)
    except ValueError as error:  # a refusal by name is the other right answer
        assert "classifier" in str(error)
        return
    outputs = {}
    for name in ("low", "whole"):
        rw.activate_adapter(model, name)
        if name == "low":
            assert model.classifier.adapter == "low"
            randomise(model)
        outputs[name] = output(model).detach()
    rw.activate_adapter(model, None)
    assert_base_bits(model, {k: v for k, v in plain.state_dict().items()})
    for name, value in outputs.items():
        rw.activate_adapter(model, name)
        assert_same_bits(output(model).detach(), value, name)


def test_one_adapter_adapts_inside_of_what_another_trains_whole():
    plain = bert_classifier().double().eval()
    low = LoRAConfig(rank=2, target_modules=["query", "dense"])
    model = randomise(rw.apply_lora(copy.deepcopy(plain), low, "low"))
    wanted = output(model).detach()
    try:
        rw.add_adapter(
            model,
            "whole",
            LoRAConfig(rank=2, target_modules=["key"], modules_to_save=["pooler", "layer.1"]),
        )
    except ValueError as error:
        assert "pooler" in str(error) or "layer.1" in str(error)
        return
    rw.activate_adapter(model, "whole")
    torch.testing.assert_close(output(model), output(plain), rtol=1e-12, atol=1e-12)
    rw.activate_adapter(model, "low")
    assert_same_bits(output(model).detach(), wanted, "the first adapter's output")


def test_names_of_adapters_are_not_modules_to_save():
    """Adapters live in the model under their names, which patterns must not see."""
    model = rw.apply_lora(bert_classifier(), PLAIN, "classifier")
    rw.activate_adapter(model, None)
    rw.add_adapter(model, "other", HEAD)
    rw.activate_adapter(model, "other")
    factors = {f"{n}.{f}" for n in adapted(model) for f in ("lora_A", "lora_B") if "key" not in n}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"classifier.weight", "classifier.bias"} | factors


def test_names_of_adapters_are_not_targets():
    model = rw.apply_lora(bert_classifier(), PLAIN, "query")
    rw.activate_adapter(model, None)
    rw.add_adapter(model, "other", LoRAConfig(rank=2, target_modules=["query"]))
    rw.add_adapter(model, "third", LoRAConfig(rank=2, target_modules=["query"]))
    rw.activate_adapter(model, "third")
    used = {n.split(".")[-1] for n, layer in adapted(model).items() if layer.adapter == "third"}
    assert used == {"query"}


def test_a_shared_module_is_saved_once_and_put_back_at_both_places():
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "one": nn.Linear(4, 2)})
    model["two"] = model["one"]
    rw.apply_lora(model, LoRAConfig(target_modules=["body"], modules_to_save=["two"]))
    assert model["one"] is model["two"] and model["one"].weight.requires_grad
    rw.activate_adapter(model, None)
    assert model["one"] is model["two"] and not model["one"].weight.requires_grad
