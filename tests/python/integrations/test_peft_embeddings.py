# PEFT's embeddings: options, scales, padding, types of indices, several adapters.
import peft
import pytest
import torch
from peft_models import (
    TOKENS,
    both,
    config,
    layer_of,
    tower,
)
from torch import nn

import rankwise.integrations.peft as rp

EMBEDDINGS = {
    "max_norm": dict(max_norm=1.0),
    "scale_grad_by_freq": dict(scale_grad_by_freq=True),
    "sparse": dict(sparse=True),
}


@pytest.mark.parametrize("option", EMBEDDINGS)
def test_embeddings_with_options_are_left(option):
    model = nn.Sequential(nn.Embedding(20, 8, **EMBEDDINGS[option]))
    model = peft.get_peft_model(model, config(target_modules=["0"]))
    expected, result, count = both(model, TOKENS)
    assert torch.equal(result, expected) and "fused" not in count


class Scaled(nn.Embedding):
    embed_scale = torch.tensor(3.0)

    def forward(self, tokens):
        return self.embed_scale * super().forward(tokens)


def test_scaled_embeddings_are_left():
    model = peft.get_peft_model(nn.Sequential(Scaled(20, 8)), config(target_modules=["0"]))
    expected, result, count = both(model, TOKENS)
    assert torch.equal(result, expected) and "fused" not in count
    plain = tower(target_modules=["embed"])
    rp.accelerate(plain)
    plain(TOKENS)
    plain.base_model.model.embed.base_layer.embed_scale = 3.0
    expected, result, _ = both(plain, TOKENS)
    torch.testing.assert_close(result, expected)


def test_a_scale_of_the_class():
    class WithScale(nn.Embedding):
        embed_scale = 2.0

    model = peft.get_peft_model(nn.Sequential(WithScale(20, 8)), config(target_modules=["0"]))
    expected, result, _ = both(model, TOKENS)
    torch.testing.assert_close(result, expected)


def test_padding_of_embeddings():
    model = peft.get_peft_model(
        nn.Sequential(nn.Embedding(20, 8, padding_idx=3)), config(target_modules=["0"])
    )
    rp.accelerate(model)
    model(TOKENS).sum().backward()
    gradient = layer_of(model).lora_embedding_A["default"].grad
    assert not gradient[:, 3].any() and gradient[:, 4].all()


@pytest.mark.parametrize("index", [torch.int64, torch.int32])
def test_index_types(index):
    expected, result, count = both(tower(target_modules=["embed"]), TOKENS.to(index))
    torch.testing.assert_close(result, expected)
    assert count == {"fused": 1}


def test_several_adapters_on_an_embedding():
    model = tower(target_modules=["embed"])
    model.add_adapter("other", config(target_modules=["embed"], lora_alpha=3))
    model.base_model.set_adapter(["other", "default"])
    expected, result, count = both(model, TOKENS)
    torch.testing.assert_close(result, expected)
    assert count == {"fused": 1}
