# What adapters cost in use: MiniLM's inference with LoRA merged and not, bottlenecks and prefixes.
"""Times MiniLM's forward pass without gradients, as table 1 of the LoRA paper does for GPT-2.

All have as many parameters as LoRA with r = 8 on query and value, 73,728 but for biases:
bottlenecks of width 8 after both parts of a layer (Houlsby et al., 2019), and prefixes of 16 keys
and values a layer (Li and Liang, 2021). Merged, the model is the plain one; "plain, again" is the
noise of the method.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import rankwise as rw

from .measurement import Measurement, number
from .step_tasks import minilm
from .timing import as_json, console, paired, table

RANK, WIDTH, PREFIX = 8, 8, 16
BATCHES = (1, 16, 32)
REFERENCE = "plain"


class Bottleneck(nn.Module):
    """A linear layer followed by h + up(gelu(down(h)))."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.out_features, WIDTH)
        self.up = nn.Linear(WIDTH, layer.out_features)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return h + self.up(F.gelu(self.down(h)))


def with_prefix(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs):
    """Attention to the layer's own keys and values [heads, PREFIX, width] too."""
    batch = key.shape[0]
    key = torch.cat([module.prefix_key.expand(batch, -1, -1, -1), key], dim=2)
    value = torch.cat([module.prefix_value.expand(batch, -1, -1, -1), value], dim=2)
    return sdpa_attention_forward(module, query, key, value, *args, **kwargs)


def lora(encoder: nn.Module) -> nn.Module:
    return rw.apply_lora(encoder, rw.LoRAConfig(rank=RANK, target_modules=["query", "value"]))


def merged(encoder: nn.Module) -> nn.Module:
    rw.merge(lora(encoder))
    return rw.unload(encoder)


def bottlenecks(encoder: nn.Module) -> nn.Module:
    for layer in encoder.encoder.layer:
        layer.attention.output.dense = Bottleneck(layer.attention.output.dense)
        layer.output.dense = Bottleneck(layer.output.dense)
    return encoder


def prefixes(encoder: nn.Module) -> nn.Module:
    AttentionInterface.register("with_prefix", with_prefix)
    config = encoder.config
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    for layer in encoder.encoder.layer:
        for name in ("prefix_key", "prefix_value"):
            prefix = nn.Parameter(torch.randn(1, heads, PREFIX, width))
            layer.attention.self.register_parameter(name, prefix)
    encoder.set_attn_implementation("with_prefix")
    return encoder


CONTENDERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    REFERENCE: lambda encoder: encoder,
    "plain, again": lambda encoder: encoder,
    "LoRA, merged": merged,
    "LoRA": lora,
    "bottlenecks": bottlenecks,
    "prefixes": prefixes,
}


def run(options: Namespace) -> dict[str, dict]:
    task = minilm(max(BATCHES), options.length)
    ids, found = task.inputs["input_ids"], {}
    plain = task.model.encoder.eval().requires_grad_(False)
    models = {name: make(copy.deepcopy(plain)).eval() for name, make in CONTENDERS.items()}
    with torch.inference_mode():
        for batch in BATCHES:
            calls = {
                name: lambda model=model, own=ids[:batch]: model(input_ids=own)
                for name, model in models.items()
            }
            rows = paired(calls, options.repeats)
            title = f"MiniLM, inference, batch {batch}, length {options.length}"
            console.print(table(title, rows, REFERENCE))
            found[title] = as_json(rows)
    return found


MEASUREMENT = Measurement(
    run,
    repeats=40,
    quick={"repeats": 8},
    arguments={"--length": number(64, "tokens of a text")},
)
