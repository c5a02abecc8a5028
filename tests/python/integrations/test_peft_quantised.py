# PEFT's layers over bases that bitsandbytes and torchao quantised: the base's product stays theirs.
import copy

import bitsandbytes
import peft
import pytest
import torch
from peft_models import calls, config, counted, fused
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import rankwise.integrations.peft as rp

WIDTH, LAYERS = 64, ["0", "2"]
X = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(0))


def plain() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


def by_bitsandbytes(kind: type, **options) -> nn.Sequential:
    model = plain()
    quantised = kind(WIDTH, WIDTH, **options)
    quantised.load_state_dict(model[0].state_dict(), strict=False)
    model[0] = quantised
    model.is_loaded_in_4bit = issubclass(kind, bitsandbytes.nn.Linear4bit)
    model.is_loaded_in_8bit = not model.is_loaded_in_4bit
    return model.to("cpu")  # the move quantises


def nf4():
    return by_bitsandbytes(bitsandbytes.nn.LinearNF4, compute_dtype=torch.float32)


def int8():
    return by_bitsandbytes(bitsandbytes.nn.Linear8bitLt, has_fp16_weights=False)


def int8_of_torchao():
    model = plain()
    quantize_(model[0], Int8WeightOnlyConfig())
    return model


LORA = dict(target_modules=LAYERS, r=4)
every = pytest.mark.parametrize("quantised", [nf4, int8, int8_of_torchao])


@every
def test_the_adapter_is_ours_and_the_base_its_own(quantised):
    model = peft.get_peft_model(quantised(), config(**LORA))
    expected = model(X)
    report = rp.accelerate(model)
    assert list(report.beside) == ["base_model.model.0"] and not report.left
    with counted(model) as count:
        torch.testing.assert_close(model(X), expected)
    assert count == {"fused": 2}
    base = model.base_model.model[0].base_layer
    seen = []
    base.register_forward_hook(lambda module, args, output: seen.append(output))
    model(X)
    assert len(seen) == 1
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(X), expected)
    report.restore()
    assert not fused(model) and torch.equal(model(X), expected)


@every
def test_training_goes_as_with_peft(quantised):
    def losses(model):
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        found = []
        for _ in range(20):
            loss = (model(X) - 1).pow(2).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    stock = peft.get_peft_model(quantised(), config(**LORA))
    ours = copy.deepcopy(stock)
    rp.accelerate(ours)
    expected = losses(stock)
    assert losses(ours) == pytest.approx(expected, rel=1e-4) and expected[-1] < expected[0]
    assert calls(ours) == {"fused": 40}


@pytest.mark.parametrize("quantised", [nf4, int8])
def test_adalora(quantised):
    options = dict(target_modules=LAYERS, init_r=6, target_r=2, total_step=12)
    model = peft.get_peft_model(quantised(), peft.AdaLoraConfig(**options))
    rp.accelerate(model)
    allocator = model.base_model.rankallocator
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    allocator.attach(optimizer)
    for _ in range(12):
        (model(X) - 1).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(allocator.ranks.values()) == 4 and calls(model) == {"fused": 24}
    result = model(X)
    rp.restore(model)
    torch.testing.assert_close(model(X), result)


@every
def test_autocast(quantised):
    model = peft.get_peft_model(quantised(), config(**LORA))
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(X)
        rp.accelerate(model)
        result = model(X)
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected, rtol=0.02, atol=0.02)


def test_a_base_that_returns_another_type():
    class Wide(nn.Linear):
        def forward(self, x):
            return super().forward(x).double()

    model = peft.get_peft_model(nn.Sequential(Wide(8, 6)), config(target_modules=["0"]))
    x = torch.randn(3, 8)
    expected = model(x)
    rp.accelerate(model)
    result = model(x)
    assert result.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(result, expected)


def test_evaluation_leaves_a_4_bit_base_differentiable():
    model = peft.get_peft_model(nf4(), config(**LORA))
    rp.accelerate(model)
    expected = model.train()(X)
    with torch.no_grad():
        assert torch.equal(model.eval()(X), expected)
    x = X.clone().requires_grad_()
    model.train()(x).sum().backward()
    alone = model.base_model.model[0].base_layer(x)
    assert alone.requires_grad and x.grad.any()
