# Small models with PEFT's layers, and what their layers did.
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import peft
import torch
import transformers
from torch import Tensor, nn

import rankwise.integrations.peft as rp
from rankwise.integrations.peft.fused import Fused

TOKENS = torch.arange(20).reshape(4, 5)


class Tower(nn.Module):
    """An embedding and three linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.second(torch.relu(self.first(self.embed(tokens)))))


def config(**options) -> peft.LoraConfig:
    """LoRA with factors that change something."""
    chosen = dict(r=4, target_modules=["embed", "first", "second"], init_lora_weights=False)
    return peft.LoraConfig(**chosen | options)


def tower(**options) -> peft.PeftModel:
    return peft.get_peft_model(Tower(), config(**options))


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=24, max_position_embeddings=16,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=24, num_key_value_heads=1, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def fused(model: nn.Module) -> dict[str, Fused]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Fused)}


def calls(model: nn.Module) -> Counter:
    """Of all layers: calls that the operators computed, "fused", and others by reason."""
    total: Counter = Counter()
    for layer in fused(model).values():
        total += Counter(fused=layer.fused_calls.fused) + layer.fused_calls.others
    return total


@contextmanager
def counted(model: nn.Module) -> Iterator[Counter]:
    """The calls of the block, once it is left."""
    found, before = Counter(), calls(model)
    yield found
    found.update(calls(model) - before)


def both(model, *args, **kwargs):
    """(PEFT's result, ours, our calls), ours by layers that may have been called before."""
    rp.accelerate(model)
    with counted(model) as count:
        result = model(*args, **kwargs)
    rp.restore(model)
    expected = model(*args, **kwargs)
    rp.accelerate(model)
    return expected, result, count


def linear(dtype: torch.dtype = torch.float32, base: nn.Module | None = None, **options):
    """A PEFT model of one layer, `0`."""
    model = nn.Sequential(base or nn.Linear(8, 6)).to(dtype)
    return peft.get_peft_model(model, config(**{"target_modules": ["0"]} | options))


def layer_of(model):
    return model.base_model.model[0]


class Doubled(nn.Linear):
    """Computes more than nn.Linear."""

    def forward(self, x):
        return 2 * super().forward(x)
