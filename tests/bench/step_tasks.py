# What whole training steps are measured on: pretrained models with a loss, and text for them.
"""Text is the demo's (examples/sentiment), strung together, so that no token is padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from classifier import Classifier, load_encoder, load_tokenizer
from smollm2 import load_model
from smollm2 import load_tokenizer as load_smollm2_tokenizer
from snippets import load_snippets
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput


@dataclass(frozen=True)
class Task:
    """model(**inputs).loss is the loss of a batch; `embedded` what the first layers get of it.

    `targets` are the linear layers to adapt, `whole` the modules that are trained as they are.
    """

    name: str
    model: nn.Module
    inputs: dict[str, Tensor]
    embedded: Tensor
    targets: list[str]
    whole: list[str]


class ClassifierWithLoss(Classifier):
    """The demo's classifier with a loss in its answer, to which PEFT adds its penalty."""

    def forward(
        self, labels: Tensor, attention_mask: Tensor, **inputs: Tensor
    ) -> SequenceClassifierOutput:
        states = self.encoder(attention_mask=attention_mask, **inputs).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        logits = self.head((states * mask).sum(1) / mask.sum(1))
        return SequenceClassifierOutput(loss=F.cross_entropy(logits, labels), logits=logits)


def minilm(batch: int = 32, length: int = 64) -> Task:
    """all-MiniLM-L6-v2 under a linear head, in training mode: its own dropout is on."""
    model = ClassifierWithLoss(load_encoder()).train()
    ids = _text(load_tokenizer(), batch, length)
    labels = torch.arange(batch) % 2
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    embedded = model.encoder.get_input_embeddings()(ids).detach()
    name = f"MiniLM, batch {batch}, length {length}"
    return Task(name, model, inputs, embedded, _linears(model, ".layer."), ["head"])


def smollm2(batch: int = 1, length: int = 512) -> Task:
    """SmolLM2-135M as a language model, float32."""
    model = load_model().train()
    ids = _text(load_smollm2_tokenizer(), batch, length)
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    name = f"SmolLM2-135M, batch {batch}, length {length}"
    embedded = model.get_input_embeddings()(ids).detach()
    return Task(name, model, inputs, embedded, _linears(model, ".layers."), [])


class Stack(nn.Module):
    """Linear layers one after the other, and a loss."""

    def __init__(self, modules: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(modules)))

    def forward(self, inputs_embeds: Tensor) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(loss=self.layers(inputs_embeds).square().mean())


def stack(modules: int, tokens: int, width: int) -> Task:
    """Nothing but layers that are adapted, so that all of the step's cost is theirs."""
    torch.manual_seed(0)
    model, x = Stack(modules, width), torch.randn(tokens, width)
    name = f"{modules} layers of {width}, {tokens} tokens"
    return Task(name, model, {"inputs_embeds": x}, x, _linears(model, ""), [])


TASKS: dict[str, Callable[[], Task]] = {"minilm": minilm, "smollm2": smollm2}


def _text(tokenizer: PreTrainedTokenizerBase, batch: int, length: int) -> Tensor:
    """Token ids [batch, length]."""
    texts = " ".join(snippet.text for snippet in load_snippets()[: batch * length // 4])
    ids = tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    return torch.tensor(ids[: batch * length]).reshape(batch, length)


def _linears(model: nn.Module, where: str) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and where in n]
