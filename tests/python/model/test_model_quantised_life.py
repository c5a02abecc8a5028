# Quantised models of transformers, evaluation before training, and what is refused.
import pytest
import torch
import transformers
from quantised_models import LAYERS, LORA, WIDTH, batch, fp4, nf4, plain
from torch import nn

import rankwise as rw

FOUR_BIT = transformers.BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
)
EIGHT_BIT = transformers.BitsAndBytesConfig(load_in_8bit=True)


@pytest.mark.parametrize("quantisation", [FOUR_BIT, EIGHT_BIT], ids=["4-bit", "8-bit"])
def test_a_model_that_transformers_quantised(quantisation, tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")

    def load():
        return transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=quantisation, dtype=torch.float32
        )

    model = rw.apply_lora(load(), rw.LoRAConfig(rank=4, target_modules="all-linear")).train()
    model.gradient_checkpointing_enable()
    assert len(rw.summary(model).layers) == 14
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
    tokens = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(6):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    rw.save_adapter(model, tmp_path / "adapter")
    again = load()
    rw.load_adapter(again, tmp_path / "adapter")
    again.train()  # bitsandbytes has other 8-bit products in eval()
    assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("evaluated", ["before", "between"])
@pytest.mark.parametrize("quantise", [nf4, fp4])
def test_evaluation_leaves_a_4_bit_base_differentiable(quantise, evaluated):
    """bitsandbytes' layout for inference on CPUs with AVX512-BF16 has no gradient of inputs."""
    model = quantise(plain())
    with torch.no_grad():
        expected = model.train()(batch())
    if evaluated == "before":
        with torch.no_grad():
            packed = model.eval()(batch())
        if torch.equal(packed, expected):  # a CPU without that layout
            rw.apply_lora(model, LORA)
        else:
            with pytest.warns(UserWarning, match="2 4-bit layers .* load the model anew"):
                rw.apply_lora(model, LORA)
            torch.testing.assert_close(model.train()(batch()), expected, atol=0.02, rtol=0.02)
    else:
        rw.apply_lora(model, LORA)
        with torch.no_grad():
            assert torch.equal(model.eval()(batch()), expected)
    for name in LAYERS:
        nn.init.normal_(model.get_submodule(name).lora_B, std=0.1)
    model.train()(batch()).square().mean().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


class WQLinear(nn.Module):  # as AutoAWQ's
    in_features = out_features = WIDTH


def test_other_libraries_layers_are_refused_by_name():
    WQLinear.__module__ = "awq.modules.linear.gemm"
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), WQLinear())
    message = r"'1' is a WQLinear quantised by awq, but adapters go to .* bitsandbytes.* torchao"
    with pytest.raises(ValueError, match=message):
        rw.apply_lora(model, rw.LoRAConfig(rank=2, target_modules=["0", "1"]))
