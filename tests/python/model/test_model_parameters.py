# parameter_groups and print_trainable_parameters, against PEFT on the same models.
import copy
import re

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from small_models import bert_classifier, gpt2, llama, output
from torch import nn
from torch.nn.parallel import DataParallel

import rankwise as rw

MODELS = {
    "bert": (bert_classifier, ["query", "value"], []),
    "head": (bert_classifier, ["query", "value"], ["classifier"]),
    "conv1d": (gpt2, ["c_attn"], []),
    "embeddings": (llama, ["q_proj", "embed_tokens"], ["lm_head"]),
    "tied": (lambda: llama(tied=True), ["q_proj", "v_proj"], []),
    "tied whole": (lambda: llama(tied=True), ["q_proj"], ["embed_tokens"]),
}


@pytest.fixture(params=MODELS)
def models(request) -> tuple[nn.Module, nn.Module]:
    """(ours, PEFT's) with the same LoRA."""
    build, targets, whole = MODELS[request.param]
    plain = build()
    config = rw.LoRAConfig(rank=3, target_modules=targets, modules_to_save=whole)
    theirs = peft.LoraConfig(
        r=3, target_modules=targets, modules_to_save=whole, fan_in_fan_out=build is gpt2
    )
    model = rw.apply_lora(copy.deepcopy(plain), config)
    return model, peft.get_peft_model(copy.deepcopy(plain), theirs)


@pytest.fixture
def sentence(capsys):
    def printed(print_parameters) -> str:
        print_parameters()
        return capsys.readouterr().out

    return printed


def test_the_numbers_are_pefts(models, sentence):
    ours, theirs = models
    wanted = sentence(theirs.print_trainable_parameters)
    assert sentence(lambda: rw.print_trainable_parameters(ours)) == wanted
    assert re.search(r"trainable params: \d+.* \|\| all params: .* \|\| trainable%: \d", wanted)
    assert sentence(lambda: rw.print_trainable_parameters(DataParallel(ours))) == wanted


def test_the_numbers_with_several_adapters(models, sentence):
    ours, theirs = models
    first = theirs.peft_config["default"]
    targets = sorted(first.target_modules)[:1]
    rw.add_adapter(ours, "second", rw.LoRAConfig(rank=5, target_modules=targets))
    config = peft.LoraConfig(r=5, target_modules=targets, fan_in_fan_out=first.fan_in_fan_out)
    theirs.add_adapter("second", config)
    for name in ("default", "second"):
        rw.activate_adapter(ours, name)
        theirs.set_adapter(name)
        wanted = sentence(theirs.print_trainable_parameters)
        assert sentence(lambda: rw.print_trainable_parameters(ours)) == wanted


def test_the_numbers_of_adalora_are_pefts(sentence):
    plain, targets = bert_classifier(), ["query", "dense"]
    config = rw.AdaLoRAConfig(target_modules=targets, total_steps=5)
    theirs = peft.AdaLoraConfig(init_r=12, target_modules=targets, total_step=5)
    wanted = sentence(peft.get_peft_model(copy.deepcopy(plain), theirs).print_trainable_parameters)
    model = rw.apply_lora(copy.deepcopy(plain), config)
    assert sentence(lambda: rw.print_trainable_parameters(model)) == wanted


class Params4bit(nn.Parameter):
    """As bitsandbytes has them: two numbers in each byte."""


def test_the_numbers_of_packed_weights_are_pefts(sentence):
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    model = rw.apply_lora(copy.deepcopy(plain), rw.LoRAConfig(rank=2, target_modules=["0"]))
    theirs = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=["0"]))
    for packed in (torch.zeros(8, 1, dtype=torch.uint8), torch.zeros(4, 1, dtype=torch.bfloat16)):
        for layer in (model[1], theirs.base_model.model[1]):
            layer.weight = Params4bit(packed, requires_grad=False)
        wanted = sentence(theirs.print_trainable_parameters)
        assert sentence(lambda: rw.print_trainable_parameters(model)) == wanted


def test_plain_models_have_no_such_numbers():
    with pytest.raises(ValueError, match="no adapters"):
        rw.print_trainable_parameters(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no adapters"):
        rw.parameter_groups(nn.Linear(2, 2), 1e-3)


def rates(model: nn.Module, groups: list[dict]) -> dict[str, float]:
    """{PEFT's name of the parameter: its learning rate}."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups)
    short = {}
    for name, rate in found.items():
        for part in ("base_model.model.", ".modules_to_save", ".default", ".weight"):
            name = name.replace(part, "", 1)
        short[name.replace("lora_embedding_", "lora_")] = rate
    return short


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_the_groups_are_pefts(models, ratio):
    ours, theirs = models
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=0.25, loraplus_lr_ratio=ratio
    )
    wanted = rates(theirs, optimizer.param_groups)
    wanted |= dict.fromkeys([name for name in wanted if name.endswith(".bias")], 0.25)  # PEFT: B's
    groups = rw.parameter_groups(ours, 0.25, ratio)
    assert rates(ours, groups) == wanted
    assert all(set(group) == {"params", "lr"} for group in groups)
    assert all(group["params"] for group in groups)


def test_only_what_trains_is_in_the_groups(models):
    ours, theirs = models
    targets = sorted(theirs.peft_config["default"].target_modules)[:1]
    rw.add_adapter(ours, "second", rw.LoRAConfig(rank=2, target_modules=targets))
    rw.activate_adapter(ours, "second")
    grouped = [p for group in rw.parameter_groups(ours, 1e-3) for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in ours.parameters() if p.requires_grad}
    rw.activate_adapter(ours, None)
    with pytest.raises(ValueError, match="nothing trains"):
        rw.parameter_groups(ours, 1e-3)


def test_adaloras_singular_values_learn_with_the_first_group():
    config = rw.AdaLoRAConfig(target_modules=["query"], total_steps=5)
    model = rw.apply_lora(bert_classifier(), config)
    found = rates(model, rw.parameter_groups(DataParallel(model), 1.0, 4.0))
    assert {name.rpartition(".")[2]: rate for name, rate in found.items()} == {
        "lora_A": 1.0, "lora_E": 1.0, "lora_B": 4.0
    }  # fmt: skip


def test_adaloras_singular_values_have_a_rate_of_their_own_and_no_decay():
    config = rw.AdaLoRAConfig(target_modules=["query"], total_steps=5)
    model = rw.apply_lora(bert_classifier(), config)
    groups = rw.parameter_groups(model, 1.0, ratio=1.0, e_ratio=6.0)
    found = rates(model, groups)
    assert {name.rpartition(".")[2]: rate for name, rate in found.items()} == {
        "lora_A": 1.0, "lora_E": 6.0, "lora_B": 1.0
    }  # fmt: skip
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]
    with pytest.raises(ValueError, match="e_ratio must be finite and positive, got 0"):
        rw.parameter_groups(model, 1.0, e_ratio=0)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_optimizers_take_the_groups(models, optimizer):
    ours, _ = models
    chosen = optimizer(rw.parameter_groups(ours, 1e-2, 4.0), lr=1.0, weight_decay=0.1)
    before = output(ours).detach()
    output(ours).square().sum().backward()
    chosen.step()
    assert not torch.equal(output(ours), before)
    assert {group["weight_decay"] for group in chosen.param_groups} == {0.1}


@pytest.mark.parametrize("ratio", [0, -1.0, float("nan"), float("inf")])
def test_wrong_ratios(ratio):
    model = rw.apply_lora(bert_classifier(), rw.LoRAConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="parameter_groups: ratio must be finite and positive"):
        rw.parameter_groups(model, 1e-3, ratio)
