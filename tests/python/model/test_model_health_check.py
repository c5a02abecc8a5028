# health_check(model): silent when all is well, and one sentence for each thing that is not.
from dataclasses import replace

import pytest
import torch
from small_models import adapted, bert, bert_classifier, gpt2, llama, loss, randomise
from torch import nn

import rankwise as rw
from rankwise.config import LoRAConfig

QV = LoRAConfig(rank=2, target_modules=["query", "value"])


def step(model: nn.Module) -> nn.Module:
    """One backward pass through everything the output depends on."""
    loss(model).backward()
    return model


def only_problem(model: nn.Module) -> str:
    report = rw.health_check(model)
    assert not report.ok
    assert len(report.problems) == 1, report.problems
    assert report.problems[0] in str(report) and "PROBLEMS" in str(report)
    return report.problems[0]


@pytest.mark.parametrize(
    "build, targets",
    [(bert, ["query", "value"]), (bert, ["query", "word_embeddings"]), (gpt2, ["c_attn", "c_fc"])],
)
def test_a_model_that_trains_has_no_problems(build, targets):
    model = step(rw.apply_lora(build(), LoRAConfig(rank=2, target_modules=targets)))
    report = rw.health_check(model)
    assert report.ok and report.problems == []
    assert report.checked == len(adapted(model))
    assert sum(report.paths.values()) == report.checked
    assert str(report).endswith("ok") and "cpu" in str(report)


def test_before_any_backward_every_factor_lacks_its_gradient():
    report = rw.health_check(rw.apply_lora(bert(), QV))
    assert len(report.problems) == 8
    assert all("no gradient" in problem for problem in report.problems)


def test_an_unused_layer_has_no_gradient():
    model = rw.apply_lora(bert(), LoRAConfig(rank=2, target_modules=["query", "pooler.dense"]))
    report = rw.health_check(step(model))
    assert [p.split(":")[0] for p in report.problems] == [
        "pooler.dense.lora_A",
        "pooler.dense.lora_B",
    ]
    assert all("no gradient; the layer took no part" in p for p in report.problems)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_gradient_that_is_not_finite(value, factor):
    model = step(rw.apply_lora(bert(), QV))
    getattr(model.encoder.layer[1].attention.self.value, factor).grad[0, 0] = value
    problem = only_problem(model)
    assert problem == f"encoder.layer.1.attention.self.value.{factor}: the gradient is not finite"


def test_a_frozen_factor():
    model = rw.apply_lora(bert(), QV)
    model.encoder.layer[0].attention.self.query.lora_A.requires_grad_(False)
    assert only_problem(step(model)) == (
        "encoder.layer.0.attention.self.query.lora_A: frozen (requires_grad is False)"
    )


def test_half_after_asking_for_float32_factors():
    config = LoRAConfig(rank=2, target_modules=["query"], adapter_dtype=torch.float32)
    model = rw.apply_lora(bert().bfloat16(), config)
    assert rw.health_check(step(model)).ok
    model.half()
    report = rw.health_check(model)
    wanted = "factors are torch.float16, but torch.float32 was asked for"
    assert [p.partition(": ")[2] for p in report.problems] == [wanted] * 2


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_one_factor_cast_up_by_hand(factor):
    model = step(rw.apply_lora(bert().bfloat16(), replace(QV, adapter_dtype=torch.bfloat16)))
    parameter = getattr(model.encoder.layer[0].attention.self.query, factor)
    parameter.grad = None
    parameter.data = parameter.data.float()
    parameter.grad = torch.ones_like(parameter)
    problem = only_problem(model)
    assert "encoder.layer.0.attention.self.query" in problem
    assert "torch.float32" in problem and "torch.bfloat16 was asked for" in problem


def test_every_factor_cast_up_where_the_bases_dtype_was_asked_for():
    model = step(rw.apply_lora(bert().bfloat16(), replace(QV, adapter_dtype=torch.bfloat16)))
    for layer in adapted(model).values():
        for parameter in (layer.lora_A, layer.lora_B):
            parameter.grad = None
            parameter.data = parameter.data.float()
            parameter.grad = torch.ones_like(parameter)
    report = rw.health_check(model)
    assert len(report.problems) >= 4
    assert all("torch.bfloat16 was asked for" in p for p in report.problems)


def test_merged_and_disabled_layers():
    model = randomise(step(rw.apply_lora(bert(), QV)))
    layer = model.encoder.layer[0].attention.self.query
    layer.merge()
    assert only_problem(model) == (
        "encoder.layer.0.attention.self.query: merged, so its adapter does not train"
    )
    layer.unmerge()
    layer.adapters_enabled = False
    assert only_problem(model) == "encoder.layer.0.attention.self.query: adapters are disabled"


def test_no_active_adapter():
    model = rw.apply_lora(bert(), QV)
    rw.activate_adapter(model, None)
    assert only_problem(model) == "no adapter is active"
    assert rw.health_check(model).checked == 0


def test_layers_whose_adapter_waits_are_not_checked():
    model = rw.apply_lora(bert(), QV, "a")
    rw.add_adapter(model, "b", LoRAConfig(rank=2, target_modules=["key"]))
    report = rw.health_check(step(model))
    assert report.ok and report.checked == 4


def test_rank_zero_needs_no_gradient():
    config = LoRAConfig(rank=2, target_modules=["query", "value"], rank_pattern={"value": 0})
    assert rw.health_check(step(rw.apply_lora(bert(), config))).ok


def test_a_weight_tied_after_the_fact():
    model = rw.apply_lora(llama(), LoRAConfig(rank=2, target_modules=["lm_head"]))
    model.model.embed_tokens.weight = model.lm_head.weight
    problem = only_problem(step(model))
    assert "lm_head: the weight is tied to model.embed_tokens" in problem


def test_a_weight_tied_after_the_fact_is_found_while_merged():
    model = randomise(rw.apply_lora(llama(), LoRAConfig(rank=2, target_modules=["lm_head"])))
    model.model.embed_tokens.weight = model.lm_head.weight
    rw.merge(model)
    assert any("tied to model.embed_tokens" in p for p in rw.health_check(model).problems)


def test_a_module_trained_whole_without_a_gradient():
    """The classifier belongs to the adapter: it is saved and switched with it."""
    config = LoRAConfig(rank=2, target_modules=["query"], modules_to_save=["classifier", "pooler"])
    model = step(rw.apply_lora(bert_classifier(), config))
    assert rw.health_check(model).ok
    model.classifier.bias.grad = None
    assert "classifier.bias" in only_problem(model)
    model.classifier.bias.grad = torch.full_like(model.classifier.bias, float("nan"))
    assert "classifier.bias" in only_problem(model)


def test_the_check_changes_nothing():
    model = step(rw.apply_lora(bert(), QV))
    before = {n: (p.detach().clone(), p.grad) for n, p in model.named_parameters()}
    rw.health_check(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.grad is before[name][1]
