# Where PEFT's layers do more than a product: variants, types, tensors for numbers, replaced parts.
# Each must come out as PEFT computes it, also when it changes after the first call.
import peft
import pytest
import torch
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale
from peft_models import (
    TOKENS,
    Doubled,
    Tower,
    both,
    config,
    counted,
    fused,
    layer_of,
    linear,
    tower,
)
from torch import nn

import rankwise.integrations.peft as rp

VARIANTS = {
    "dora": dict(use_dora=True),
    "mica": dict(init_lora_weights="mica"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_left_and_named(variant):
    model = linear(**VARIANTS[variant])
    expected, result, count = both(model, torch.randn(3, 8))
    assert torch.equal(result, expected) and count == {"variant": 1}
    report = rp.accelerate(model)
    assert not report.taken and variant in str(report).lower()
    model.add_adapter("plain", config(target_modules=["0"]))
    model.set_adapter("plain")
    expected, result, count = both(model, torch.randn(3, 8))
    torch.testing.assert_close(result, expected)
    assert count == {"fused": 1}
    model.base_model.set_adapter(["default", "plain"])
    expected, result, count = both(model, torch.randn(3, 8))
    assert torch.equal(result, expected) and count == {"variant": 1}


def test_scaling_is_read_in_each_call():
    model, x = linear(), torch.randn(3, 8)
    rp.accelerate(model)
    outputs = [model(x)]
    for change in (
        lambda: layer_of(model).set_scale("default", 3),
        lambda: layer_of(model).scale_layer(0.5),
        lambda: layer_of(model).unscale_layer(),
    ):
        change()
        expected, result, count = both(model, x)
        torch.testing.assert_close(result, expected)
        assert count == {"fused": 1} and not torch.equal(result, outputs[-1])
        outputs.append(result)
    with rescale_adapter_scale(model, 0.25):
        expected, result, _ = both(model, x)
        torch.testing.assert_close(result, expected)
    torch.testing.assert_close(model(x), outputs[-1])


def test_scaling_that_is_a_tensor_stays_on_its_device():
    model, x = linear(), torch.randn(3, 8)
    layer = layer_of(model)
    layer.scaling["default"] = torch.tensor(layer.scaling["default"])
    expected, result, count = both(model, x)
    assert torch.equal(result, expected) and count == {"scaling is a Tensor": 1}


def test_replaced_factors_are_noticed():
    model, x = linear(), torch.randn(3, 8)
    rp.accelerate(model)
    model(x)
    layer = layer_of(model)
    for factor, shape in (("lora_A", (8, 2)), ("lora_B", (2, 6))):
        getattr(layer, factor)["default"] = nn.Linear(*shape, bias=False)
    expected, result, count = both(model, x)
    torch.testing.assert_close(result, expected)
    rp.accelerate(model)
    model(x)
    layer.lora_A["default"].weight = nn.Parameter(torch.randn(2, 8))
    changed = model(x)
    rp.restore(model)
    torch.testing.assert_close(changed, model(x))


def test_a_replaced_base_is_noticed():
    model, x = linear(), torch.randn(3, 8)
    rp.accelerate(model)
    model(x)
    layer_of(model).base_layer = Doubled(8, 6)
    expected, result, _ = both(model, x)
    torch.testing.assert_close(result, expected)


def test_hot_swapped_adapters(tmp_path):
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    linear(r=6, lora_alpha=5).save_pretrained(tmp_path)
    model, x = linear(r=4), torch.randn(3, 8)
    rp.accelerate(model)
    model(x)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    hotswap_adapter(model, tmp_path, "default")
    expected, result, _ = both(model, x)
    torch.testing.assert_close(result, expected)


BF16 = torch.bfloat16
TYPES = {  # base, input, adapters -> ours
    "float32": (torch.float32, torch.float32, torch.float32, True),
    "float64": (torch.float64, torch.float64, torch.float64, True),
    "float32 adapters over bfloat16": (BF16, BF16, torch.float32, True),
    "bfloat16": (BF16, BF16, BF16, True),
    "bfloat16 adapters over float32": (torch.float32, torch.float32, BF16, False),
}


@pytest.mark.parametrize("types", TYPES)
def test_types(types):
    base, of_input, adapters, ours = TYPES[types]
    model = linear()
    layer_of(model).base_layer.to(base)
    for factors in (layer_of(model).lora_A, layer_of(model).lora_B):
        factors.to(adapters)
    expected, result, count = both(model, torch.randn(3, 8, dtype=of_input))
    assert result.dtype == expected.dtype
    close = dict(rtol=0.02, atol=0.005) if base is BF16 else {}
    torch.testing.assert_close(result, expected, **close)
    assert (count == {"fused": 1}) is ours


def test_autocast():
    model, x = linear(), torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected, result, count = both(model, x)
        assert result.dtype == expected.dtype == torch.bfloat16 and count == {"fused": 1}
        torch.testing.assert_close(result, expected, rtol=0.02, atol=0.02)
        expected, result, count = both(linear(BF16), x)
        assert result.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(result, expected, rtol=0.02, atol=0.02)


def test_inputs_that_are_not_cast():
    model = linear()
    layer_of(model).base_layer.to(BF16)
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError):
        both(model, torch.randn(3, 8, dtype=BF16))


@pytest.mark.parametrize("arguments", [dict(adapter_names=None), dict(alora_offsets=None), {}])
def test_arguments_of_hooks_that_mean_nothing(arguments):
    model, x = linear(), torch.randn(3, 8)
    rp.accelerate(model)
    with counted(model) as count:
        layer_of(model)(x, **arguments)
    assert count == {"fused": 1}
    with pytest.raises(TypeError):
        layer_of(model)(x, unknown=None)


def test_bias_of_the_adapter():
    model = linear(lora_bias=True)
    nn.init.normal_(layer_of(model).lora_B["default"].bias)
    expected, result, count = both(model, torch.randn(3, 8))
    torch.testing.assert_close(result, expected)
    assert count == {"fused": 1}


def test_dropout_follows_the_mode_and_the_probability():
    model, x = linear(lora_dropout=0.5), torch.randn(64, 8)
    expected, result, _ = both(model.eval(), x)
    torch.testing.assert_close(result, expected)
    model.train()
    assert not torch.equal(model(x), model(x))
    layer_of(model).lora_dropout["default"].p = 0.0
    expected, result, count = both(model, x)
    torch.testing.assert_close(result, expected)
    assert count == {"fused": 1}
    layer_of(model).lora_dropout["default"] = nn.Hardtanh()
    expected, result, count = both(model, x)
    assert torch.equal(result, expected) and count == {"dropout is a Hardtanh": 1}


def test_adapters_that_appear_in_an_active_list():
    model, x = linear(), torch.randn(3, 8)
    rp.accelerate(model)
    layer = layer_of(model)
    layer.set_adapter(["default", "later"])
    model(x)
    layer.update_layer("later", 4, lora_alpha=8, config=config(target_modules=["0"]))
    layer.set_adapter(layer.active_adapters)
    expected, result, count = both(model, x)
    torch.testing.assert_close(result, expected)


def test_names_that_peft_looks_at():
    model = tower()
    before = repr(model)
    rp.accelerate(model)
    assert repr(model) == before
    for layer in fused(model).values():
        assert type(layer).__name__ in ("Linear", "Embedding")
        assert isinstance(layer, (peft.tuners.lora.Linear, peft.tuners.lora.Embedding))


def test_all_linear_of_a_second_adapter():
    model = tower()
    rp.accelerate(model)
    stock = tower()
    for each in (model, stock):
        each.add_adapter("all", peft.LoraConfig(target_modules="all-linear"))
    names = [set(each.base_model.targeted_module_names) for each in (model, stock)]
    assert names[0] == names[1]


def test_gpt2s_layers():
    from peft_models import gpt2

    model = peft.get_peft_model(gpt2(), config(target_modules=["c_attn", "c_proj", "wte"]))
    expected, result, count = both(model, TOKENS)
    torch.testing.assert_close(result.logits, expected.logits)
    assert set(count) == {"fused"} and count["fused"] == 7


def test_offloaded_bases():
    accelerate = pytest.importorskip("accelerate")
    model = peft.get_peft_model(Tower(), config(target_modules=["first", "second"]))
    rp.accelerate(model)
    expected = model(TOKENS)
    accelerate.cpu_offload(model.base_model.model, execution_device=torch.device("cpu"))
    torch.testing.assert_close(model(TOKENS), expected)
