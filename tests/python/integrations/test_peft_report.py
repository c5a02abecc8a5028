# What accelerate() tells: what was taken, what was left and why, by name where few.
import peft
import pytest
import torch
from adalora_runs import Schedule
from peft_models import TOKENS, bert, config, tower
from torch import nn

import rankwise.integrations.peft as rp


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.convolution = nn.Conv1d(8, 8, 1)
        self.attention = nn.MultiheadAttention(8, 2)


def test_what_was_taken_and_what_left():
    targets = ["linear", "second", "convolution", "attention"]
    model = peft.get_peft_model(Zoo(), config(target_modules=targets))
    report = rp.accelerate(model)
    text = str(report)
    assert report.taken == {f"base_model.model.{n}": "Linear" for n in ("linear", "second")}
    assert "taken: 2 Linear" in text and "adapters float32 over float32" in text
    assert "1 Conv1d: convolution (base_model.model.convolution)" in text
    assert "1 MultiheadAttention: " in text and set(report.left) == {
        "base_model.model.convolution",
        "base_model.model.attention",
    }


def test_a_parameter_of_a_module():
    model = peft.get_peft_model(
        Zoo(), config(target_modules=["second"], target_parameters=["linear.weight"])
    )
    report = rp.accelerate(model)
    assert "ParamWrapper: parameter of a module" in str(report) and len(report.taken) == 1


def test_many_are_counted_without_names():
    model = peft.get_peft_model(
        bert(), config(target_modules=["query", "key", "value"], use_dora=True)
    )
    text = str(rp.accelerate(model))
    assert "left to PEFT: 6 Linear: DoraLinearVariant" in text and "query" not in text
    assert "taken: nothing" in text


def test_bases_with_hooks():
    model = tower()
    model.base_model.model.first.base_layer.register_forward_hook(lambda *args: None)
    report = rp.accelerate(model)
    assert report.beside == {"base_model.model.first": "Linear"}
    assert "beside a base that computes itself: 1 Linear" in str(report)


def test_types_and_ranks():
    model = Schedule().model()
    report = rp.accelerate(model)
    assert "ranks: RankAllocator(2 adapters, step 0, budget 12 of 12)" in str(report)
    half = tower(target_modules=["first"])
    half.base_model.model.first.base_layer.to(torch.bfloat16)
    assert "adapters float32 over bfloat16" in str(rp.accelerate(half))


def test_calls_are_counted_by_reason():
    model = tower(target_modules=["first"])
    report = rp.accelerate(model)
    model(TOKENS)
    with model.disable_adapter():
        model(TOKENS)
    model(TOKENS)
    assert report.calls() == {"base_model.model.first": {"fused": 2, "disabled": 1}}


@pytest.mark.parametrize("kind", [peft.LoHaConfig, peft.IA3Config])
def test_other_methods(kind):
    options = {} if kind is peft.LoHaConfig else {"feedforward_modules": []}
    model = peft.get_peft_model(tower().unload(), kind(target_modules=["first"], **options))
    report = rp.accelerate(model)
    assert "no operator for peft.tuners" in str(report) and not report.taken
