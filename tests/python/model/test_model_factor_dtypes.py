# Factors are float32 over 16-bit bases unless the base's dtype is asked for.
import copy

import pytest
import torch
from small_models import adapted, bert, bert_classifier, gpt2, llama, loss, output
from torch import nn

import rankwise as rw

NARROW = [torch.bfloat16, torch.float16]
BUILDS = {
    "linear": (bert, ["query", "value"]),
    "conv1d": (gpt2, ["c_attn"]),
    "embedding": (llama, ["embed_tokens", "q_proj"]),
}


def factor_dtypes(model: nn.Module) -> set[torch.dtype]:
    held = [layer.held_adapter(n) for layer in adapted(model).values() for n in layer.adapter_names]
    factors = [f for h in held for f in (h.lora_A, h.lora_B, h.lora_E) if f is not None]
    return {factor.dtype for factor in factors}


@pytest.mark.parametrize("build, targets", BUILDS.values(), ids=BUILDS)
@pytest.mark.parametrize("dtype", NARROW)
def test_float32_over_sixteen_bits(build, targets, dtype):
    model = rw.apply_lora(build().to(dtype), rw.LoRAConfig(rank=2, target_modules=targets))
    rw.add_adapter(model, "second", rw.LoRAConfig(rank=3, target_modules=targets))
    assert factor_dtypes(model) == {torch.float32}
    assert output(model).dtype == dtype
    loss(model).float().backward()
    assert rw.health_check(model).ok


@pytest.mark.parametrize("dtype", NARROW)
def test_adaloras_too(dtype):
    config = rw.AdaLoRAConfig(target_modules=["query"], total_steps=5)
    model = rw.apply_lora(bert().to(dtype), config)
    assert factor_dtypes(model) == {torch.float32}
    assert rw.RankAllocator(model, rw.adalora_config(model)).steps == 0


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("kind", [rw.nn.LoRALinear, rw.nn.AdaLoRALinear, rw.nn.LoRAEmbedding])
def test_layers_made_by_hand(kind, dtype):
    assert kind(6, 4, dtype=dtype).lora_A.dtype == torch.float32
    assert kind(6, 4, dtype=dtype, adapter_dtype=dtype).lora_A.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bases_over_others(dtype):
    model = rw.apply_lora(bert().to(dtype), rw.LoRAConfig(target_modules=["query"]))
    assert factor_dtypes(model) == {dtype}


@pytest.mark.parametrize("build, targets", BUILDS.values(), ids=BUILDS)
@pytest.mark.parametrize("dtype", NARROW)
def test_sixteen_bits_on_request(build, targets, dtype):
    config = rw.LoRAConfig(rank=2, target_modules=targets, adapter_dtype=dtype)
    model = rw.apply_lora(build().to(dtype), config)
    assert factor_dtypes(model) == {dtype}
    loss(model).float().backward()
    assert rw.health_check(model).ok


def test_each_layer_goes_by_its_own_base():
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16), nn.Linear(4, 4).double())
    rw.apply_lora(model, rw.LoRAConfig(rank=2, target_modules=["0", "1"]))
    assert [layer.lora_A.dtype for layer in model] == [torch.float32, torch.float64]


def test_small_updates_are_not_lost():
    torch.manual_seed(0)
    model = rw.apply_lora(bert().bfloat16(), rw.LoRAConfig(target_modules=["query"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.fill_(1.0)
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all((parameter < 1.0).all() for parameter in trained)  # 1 - 1e-4 is 1 in bfloat16


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "method", [rw.LoRAConfig, lambda **o: rw.AdaLoRAConfig(total_steps=5, **o)]
)
def test_folders_keep_their_dtype(tmp_path, stored, method):
    config = method(target_modules=["query"], adapter_dtype=stored)
    plain = bert().bfloat16()
    rw.save_adapter(rw.apply_lora(copy.deepcopy(plain), config), tmp_path)
    model = copy.deepcopy(plain)
    rw.load_adapter(model, tmp_path)
    assert factor_dtypes(model) == {stored}
    rw.save_adapter(model, tmp_path / "again")
    again = copy.deepcopy(plain)
    rw.load_adapter(again, tmp_path / "again")
    assert factor_dtypes(again) == {stored}


def test_sixteen_bit_folders_fill_float32_factors(tmp_path):
    config = rw.LoRAConfig(target_modules=["query"], adapter_dtype=torch.bfloat16)
    rw.save_adapter(rw.apply_lora(bert().bfloat16(), config), tmp_path)
    model = rw.apply_lora(bert().bfloat16(), rw.LoRAConfig(target_modules=["query"]))
    with pytest.warns(UserWarning, match="is torch.bfloat16 and becomes torch.float32"):
        rw.load_adapter(model, tmp_path)
    assert factor_dtypes(model) == {torch.float32}


@pytest.mark.parametrize("dtype", NARROW)
def test_modules_trained_whole_keep_the_bases(dtype):
    config = rw.LoRAConfig(target_modules=["query"], modules_to_save=["classifier"])
    model = rw.apply_lora(bert_classifier().to(dtype), config)
    assert model.classifier.weight.dtype == dtype


def test_health_when_default_factors_were_rounded_later():
    model = rw.apply_lora(bert().bfloat16(), rw.LoRAConfig(target_modules=["query"])).bfloat16()
    problems = rw.health_check(model).problems
    assert any("factors are torch.bfloat16, but torch.float32 was asked for" in p for p in problems)
