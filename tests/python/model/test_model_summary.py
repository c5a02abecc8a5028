# summary(model): its numbers against PEFT's, and the table people read.
import copy

import peft
import pytest
import torch
from small_models import BUILDERS, adapted, bert, bert_classifier, randomise
from torch import nn

import rankwise as rw
from rankwise.config import LoRAConfig

CONFIGS = [
    ("bert", {"target_modules": ["query", "value"]}, {}),
    ("bert", {"target_modules": ["query", "word_embeddings"], "rank_pattern": {"query": 3}}, {}),
    ("bert", {"target_modules": "all-linear", "rank_pattern": {"key": 1, "dense": 5}}, {}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj", "wte"], "exclude_modules": ["wte"]}, {}),
    ("llama", {"target_modules": "all-linear"}, {}),
    ("llama_tied", {"target_modules": ["q_proj"]}, {}),
    ("t5", {"target_modules": ["q", "v", "wo"]}, {}),
    ("bert_classifier", {"target_modules": ["query"], "modules_to_save": ["classifier"]}, {}),
]


@pytest.mark.parametrize("architecture, config, _", CONFIGS)
@pytest.mark.filterwarnings("ignore")
def test_the_counts_are_pefts(architecture, config, _):
    model = BUILDERS[architecture]()
    stock = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, **config))
    trainable, total = stock.get_nb_trainable_parameters()
    # PEFT counts the frozen original beside its trained copy.
    total -= sum(p.numel() for n, p in stock.named_parameters() if ".original_module." in n)
    found = rw.summary(rw.apply_lora(model, LoRAConfig(rank=2, **config)))
    assert (found.trainable, found.total) == (trainable, total)


@pytest.mark.filterwarnings("ignore")
def test_the_last_line_is_pefts_own(capsys):
    model = bert()
    peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=["key"])
    ).print_trainable_parameters()
    wanted = capsys.readouterr().out.strip()
    text = str(rw.summary(rw.apply_lora(model, LoRAConfig(rank=2, target_modules=["key"]))))
    assert text.splitlines()[-1] == wanted


def test_every_layer_with_its_figures():
    config = LoRAConfig(
        rank=4,
        alpha=8.0,
        dropout=0.1,
        target_modules=["query", "intermediate.dense"],
        rank_pattern={r"layer\.1\..*": 2},
        adapter_dtype=torch.float32,
    )
    layers = rw.summary(rw.apply_lora(bert().bfloat16(), config)).layers
    assert [layer.name for layer in layers] == [
        "encoder.layer.0.attention.self.query",
        "encoder.layer.0.intermediate.dense",
        "encoder.layer.1.attention.self.query",
        "encoder.layer.1.intermediate.dense",
    ]
    last = layers[-1]
    assert (last.in_features, last.out_features) == (16, 24)
    assert (last.adapter, last.rank, last.capacity, last.scaling) == ("default", 2, 2, 4.0)
    assert (last.base_dtype, last.adapter_dtype) == (torch.bfloat16, torch.float32)
    assert last.dropout == 0.1
    assert last.path == rw.ops.path(torch.empty(1, dtype=last.base_dtype)) and not last.merged


def test_an_embedding_reports_no_dropout_because_it_has_none():
    config = LoRAConfig(dropout=0.3, target_modules=["word_embeddings", "query"])
    layers = {x.name.split(".")[-1]: x for x in rw.summary(rw.apply_lora(bert(), config)).layers}
    assert layers["query"].dropout == 0.3
    assert layers["word_embeddings"].dropout == 0.0


def test_the_table_has_a_line_for_each_layer():
    model = rw.apply_lora(
        bert(), LoRAConfig(rank=3, target_modules=["query", "position_embeddings"])
    )
    lines = str(rw.summary(model)).splitlines()
    assert lines[0].split() == "layer in out rank scaling dropout base adapter path".split()
    assert [line.split()[0] for line in lines[1:-1]] == list(adapted(model))
    assert lines[1].split()[1:] == "16 16 3 5.33333 0 float32 float32 embedding".split()
    assert all(line == line.rstrip() for line in lines)


def test_capacity_shows_beside_the_rank():
    model = nn.Sequential(rw.nn.LoRALinear(4, 4, rank=2, capacity=5))
    assert "2/5" in str(rw.summary(model))


def test_merged_disabled_and_base_only_layers_say_so():
    model = randomise(rw.apply_lora(bert(), LoRAConfig(rank=2, target_modules=["query"])))
    rw.merge(model)
    assert [line.split()[-1] for line in str(rw.summary(model)).splitlines()[1:-1]] == [
        "merged"
    ] * 2
    rw.unmerge(model)
    with rw.disable_adapters(model):
        lines = str(rw.summary(model)).splitlines()[1:-1]
        assert all(line.endswith(("disabled", "base only")) for line in lines)
    rw.activate_adapter(model, None)
    text = str(rw.summary(model))
    assert text.count("base only") == 2
    assert "None" not in text and "NoneType" not in text


def test_adapters_that_wait_do_not_count():
    model = rw.apply_lora(bert_classifier(), LoRAConfig(rank=2, target_modules=["query"]))
    before = rw.summary(model)
    config = LoRAConfig(rank=7, target_modules=["query", "key"], modules_to_save=["classifier"])
    rw.add_adapter(model, "wide", config)
    after = rw.summary(model)
    assert (after.trainable, after.total) == (before.trainable, before.total)
    rw.activate_adapter(model, "wide")
    wide = rw.summary(model)
    assert wide.trainable == 4 * 7 * 32 + 34
    assert wide.total == before.total - before.trainable + 4 * 7 * 32


def test_the_summary_changes_nothing_while_merged():
    model = randomise(rw.apply_lora(bert(), LoRAConfig(rank=2, target_modules=["query"])))
    before = rw.summary(model)
    rw.merge(model)
    merged = rw.summary(model)
    assert (merged.trainable, merged.total) == (before.trainable, before.total)
    assert all(layer.merged for layer in merged.layers)
