# Every refusal of apply_lora and add_adapter: its message, and the model as it was.
import re

import pytest
import torch
from small_models import assert_unchanged, bert, bert_classifier, fingerprint, gpt2, llama, t5
from torch import nn
from torch.nn.utils import prune

import rankwise as rw
from rankwise.config import LoRAConfig


class Quantised(nn.Linear):
    """Stands for quantised layers: a subclass of nn.Linear that computes something else."""


class Tied(nn.Module):
    """A weight used by a linear and, under another attribute's name, by the module itself."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)
        self.table = self.linear.weight


def quantised() -> nn.Module:
    return nn.ModuleDict({"query": Quantised(4, 4), "value": nn.Linear(4, 4)})


def pruned() -> nn.Module:
    model = nn.ModuleDict({"query": nn.Linear(4, 4), "value": nn.Linear(4, 4)})
    prune.identity(model["query"], "weight")
    return model


def hooked() -> nn.Module:
    model = nn.ModuleDict({"value": nn.Linear(4, 4), "query": nn.Linear(4, 4)})
    model["query"].forward = lambda x: x
    return model


def mixed_dtypes() -> nn.Module:
    return nn.ModuleDict({"query": nn.Linear(4, 4).bfloat16(), "value": nn.Linear(4, 4).double()})


def attention() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)


QV = ["query", "value"]
CASES = {
    "near miss": (
        bert, {"target_modules": ["qeury"]},
        r"target_modules: 'qeury' matches no module; did you mean .*'query'",
    ),
    "second of two names": (
        bert, {"target_modules": ["query", "valeu"]},
        r"target_modules: 'valeu' matches no module; did you mean .*'value'",
    ),
    "half a name": (
        bert, {"target_modules": ["attention.self.quer"]},
        r"'attention.self.quer' matches no module; did you mean .*'attention.self.query'",
    ),
    "nothing alike": (
        gpt2, {"target_modules": ["zzz"]},
        r"target_modules: 'zzz' matches no module; names end in .*'c_attn'",
    ),
    "regular expression": (
        bert, {"target_modules": r"querry"},
        r"target_modules: the regular expression 'querry' matches no whole name.*'query'",
    ),
    "regular expression of a part": (
        bert, {"target_modules": r"query"},
        r"target_modules: the regular expression 'query' matches no whole name",
    ),
    "broken regular expression": (
        bert, {"target_modules": "*.query"},
        r"target_modules: .*'\*\.query'.*",
    ),
    "broken rank pattern": (
        bert, {"target_modules": QV, "rank_pattern": {"(query": 2}},
        r"rank_pattern: .*'\(query'",
    ),
    "exclusion": (
        bert, {"target_modules": QV, "exclude_modules": ["querx"]},
        r"exclude_modules: 'querx' matches no module; did you mean .*'query'",
    ),
    "exclusion by expression": (
        bert, {"target_modules": QV, "exclude_modules": "querx"},
        r"exclude_modules: the regular expression 'querx' matches no whole name",
    ),
    "all excluded": (
        bert, {"target_modules": QV, "exclude_modules": ["query", "value"]},
        r"target_modules: \['query', 'value'\] leaves no module to adapt",
    ),
    "rank pattern": (
        bert, {"target_modules": QV, "rank_pattern": {"query": 2, "valeu": 3}},
        r"rank_pattern: 'valeu' matches none of the 4 targets; did you mean .*'value'",
    ),
    "rank pattern outside of the targets": (
        bert, {"target_modules": QV, "rank_pattern": {"key": 2}},
        r"rank_pattern: 'key' matches none of the 4 targets",
    ),
    "alpha pattern": (
        bert, {"target_modules": QV, "alpha_pattern": {"kye": 2.0}},
        r"alpha_pattern: 'kye' matches none of the 4 targets",
    ),
    "rank of a pattern": (
        bert, {"target_modules": QV, "rank_pattern": {"value": -2}},
        r"rank must be an integer >= 0, got -2",
    ),
    "modules to save": (
        bert_classifier, {"target_modules": QV, "modules_to_save": ["clasifier"]},
        r"modules_to_save: 'clasifier' matches no module; did you mean .*'classifier'",
    ),
    "second of the modules to save": (
        bert_classifier, {"target_modules": QV, "modules_to_save": ["classifier", "score"]},
        r"modules_to_save: 'score' matches no module",
    ),
    "no layer": (
        bert, {"target_modules": ["LayerNorm"]},
        r"target_modules: 'embeddings.LayerNorm' is a LayerNorm, but adapters go to nn.Linear",
    ),
    "a block": (
        bert, {"target_modules": ["attention"]},
        r"target_modules: 'encoder.layer.0.attention' is a BertAttention, but adapters go to",
    ),
    "quantised": (
        quantised, {"target_modules": QV},
        r"target_modules: 'query' is a Quantised, but adapters go to nn.Linear",
    ),
    "attention's projection": (
        attention, {"target_modules": ["linear1", "out_proj"]},
        r"'self_attn.out_proj' is a NonDynamicallyQuantizableLinear, but adapters go to",
    ),
    "attention's projection alone by expression": (
        attention, {"target_modules": r".*out_proj"},
        r"target_modules: .*out_proj.*NonDynamicallyQuantizableLinear",
    ),
    "replaced forward": (
        hooked, {"target_modules": QV},
        r"query.*the Linear's forward was replaced on the instance",
    ),
    "computed weight": (pruned, {"target_modules": QV}, r"'?query'?.*weight"),
    "tied embedding": (
        lambda: llama(tied=True), {"target_modules": ["q_proj", "embed_tokens"]},
        r"target_modules: 'model.embed_tokens' has its weight tied to 'lm_head'",
    ),
    "tied head": (
        lambda: llama(tied=True), {"target_modules": ["lm_head"]},
        r"target_modules: 'lm_head' has its weight tied to 'model.embed_tokens'",
    ),
    "tied table of T5": (
        t5, {"target_modules": ["shared"]},
        r"target_modules: 'shared' has its weight tied to .*'decoder.embed_tokens'",
    ),
    "tied by another attribute": (
        Tied, {"target_modules": ["linear"]},
        r"target_modules: 'linear' has its weight tied to .*'table'",
    ),
    "tied and trained whole": (
        lambda: llama(tied=True), {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        r"modules_to_save: 'lm_head' has its weight tied to 'model.embed_tokens'",
    ),
    "dtype": (
        bert, {"target_modules": QV, "adapter_dtype": torch.bfloat16},
        r"dtype must be torch.float32 like the base's.*got torch.bfloat16",
    ),
    "dtype of the second layer": (
        mixed_dtypes, {"target_modules": QV, "adapter_dtype": torch.float32},
        r"dtype must be torch.float64 like the base's.*got torch.float32",
    ),
    "the model is the layer": (
        lambda: nn.Linear(4, 4), {"target_modules": "all-linear"},
        r"the model itself is a layer; use LoRALinear.from_linear\(layer\)",
    ),
    "embedding with max_norm": (
        lambda: nn.ModuleDict({"a": nn.Linear(4, 4), "table": nn.Embedding(4, 4, max_norm=1.0)}),
        {"target_modules": ["a", "table"]},
        r"table.*an embedding with max_norm is not supported",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused_with_a_message_and_nothing_changed(case):
    build, config, message = CASES[case]
    model = build()
    next(model.parameters()).requires_grad_(False)  # a flag that must not be lost
    before = fingerprint(model)
    with pytest.raises((ValueError, TypeError)) as caught:
        rw.apply_lora(model, LoRAConfig(**config))
    assert_unchanged(model, before)
    assert re.search(message, str(caught.value), re.DOTALL), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", [c for c in CASES if CASES[c][0] in (bert, bert_classifier)])
def test_add_adapter_refuses_the_same_and_changes_nothing(case):
    build, config, message = CASES[case]
    model = rw.apply_lora(build(), LoRAConfig(target_modules=["query"]))
    before = fingerprint(model)
    with pytest.raises(ValueError) as caught:
        rw.add_adapter(model, "second", LoRAConfig(**config))
    assert_unchanged(model, before)
    assert re.search(message, str(caught.value), re.DOTALL), caught.value
    assert rw.adapter_names(model) == ["default"]
