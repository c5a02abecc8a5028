"""Adapter folders: stock PEFT loads what is saved here and the reverse, with equal logits."""

import copy
import json
from collections import OrderedDict
from dataclasses import replace

import peft
import pytest
import torch
from file_models import bert, gpt2, loads_in_place, output, randomise

import rankwise as rw

BERT = {
    "suffixes": {"target_modules": ["query", "dense"]},
    "embedding": {"target_modules": ["word_embeddings", "value"]},
    "patterns": {
        "target_modules": ["query", "dense"],
        "rank_pattern": {"query": 2, "layer.1.output.dense": 7},
        "alpha_pattern": {"layer.0.attention.self.query": 3.0},
    },
    "rslora": {"target_modules": "all-linear", "rslora": True},
    "whole modules": {"target_modules": ["query"], "modules_to_save": ["embeddings.LayerNorm"]},
    "rank 0 in one layer": {"target_modules": ["query"], "rank_pattern": {"layer.0.*query": 0}},
}


@pytest.mark.parametrize("options", BERT.values(), ids=BERT)
def test_peft_reads_what_we_save(tmp_path, options):
    model = rw.apply_lora(bert(), rw.LoRAConfig(rank=4, alpha=8.0, **options))
    randomise(model)
    rw.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(bert(), tmp_path).eval()
    torch.testing.assert_close(output(theirs), output(model), rtol=0, atol=1e-6)
    assert not torch.equal(output(model), output(bert()))


@pytest.mark.parametrize("options", BERT.values(), ids=BERT)
def test_we_read_what_we_save_bit_for_bit(tmp_path, options):
    model = rw.apply_lora(bert(), rw.LoRAConfig(rank=4, alpha=8.0, **options))
    randomise(model)
    rw.save_adapter(model, tmp_path)
    again = bert()
    assert rw.load_adapter(again, tmp_path) == rw.LoadReport()
    assert torch.equal(output(again.eval()), output(model))


PEFT = {
    "bert": (bert, {"target_modules": ["query", "dense"], "r": 4, "lora_alpha": 6}),
    "regular expression": (bert, {"target_modules": r".*\.1\..*(query|key)", "r": 3}),
    "patterns": (
        bert,
        {
            "target_modules": ["query", "key"],
            "rank_pattern": {"layer.1.attention.self.query": 2, "encoder.*key": 5},
            "alpha_pattern": {"key": 9},
        },
    ),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "rslora": (gpt2, {"target_modules": ["c_fc"], "fan_in_fan_out": True, "use_rslora": True}),
    "whole": (bert, {"target_modules": ["query"], "modules_to_save": ["embeddings.LayerNorm"]}),
    "embedding": (bert, {"target_modules": ["word_embeddings"]}),
}


@pytest.mark.parametrize("base, options", PEFT.values(), ids=PEFT)
def test_we_read_what_peft_saves_and_peft_reads_it_back(tmp_path, base, options):
    theirs = peft.get_peft_model(base(), peft.LoraConfig(**options)).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours = base()
    rw.load_adapter(ours, tmp_path / "theirs")
    torch.testing.assert_close(output(ours.eval()), output(theirs), rtol=0, atol=1e-6)
    rw.save_adapter(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    torch.testing.assert_close(output(back), output(theirs), rtol=0, atol=1e-6)


def test_saving_is_deterministic_and_replaces(tmp_path):
    model = rw.apply_lora(bert(), rw.LoRAConfig(rank=4, target_modules=["query"]))
    for folder in ("a", "b", "b"):
        rw.save_adapter(copy.deepcopy(model), tmp_path / folder)
    files = sorted(path.name for path in (tmp_path / "b").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_loading_into_the_adapter_that_is_there(tmp_path):
    model = rw.apply_lora(bert(), rw.LoRAConfig(rank=4, target_modules=["query"])).eval()
    randomise(model)
    loads_in_place(model, tmp_path)


def test_several_adapters_from_files_and_their_names(tmp_path):
    model = rw.apply_lora(bert(), rw.LoRAConfig(rank=4, target_modules=["query"]), name="one")
    rw.add_adapter(model, "two", rw.LoRAConfig(rank=2, target_modules=["value"]))
    outputs = {}
    for name in ("one", "two"):
        rw.activate_adapter(model, name)
        randomise(model)
        outputs[name] = output(model)
        rw.save_adapter(model, tmp_path / name)
    rw.save_adapter(model, tmp_path / "one again", name="one")  # not the active one
    loaded = bert()
    for name in ("one", "two"):
        rw.load_adapter(loaded, tmp_path / name, name=name)
    rw.load_adapter(loaded, tmp_path / "one again", name="third")
    for name, wanted in {**outputs, "third": outputs["one"]}.items():
        rw.activate_adapter(loaded, name)
        assert torch.equal(output(loaded), wanted)


def test_dtypes_are_kept_or_widened_never_rounded(tmp_path):
    masters = rw.LoRAConfig(rank=4, target_modules=["query"], adapter_dtype=torch.float32)
    rw.save_adapter(rw.apply_lora(bert().bfloat16(), masters), tmp_path / "fp32")
    loaded = bert().bfloat16()
    rw.load_adapter(loaded, tmp_path / "fp32")
    assert {p.dtype for n, p in loaded.named_parameters() if "lora_" in n} == {torch.float32}

    config = rw.LoRAConfig(rank=4, target_modules=["query"])
    narrow = replace(config, adapter_dtype=torch.float16)
    rw.save_adapter(rw.apply_lora(bert().half(), narrow), tmp_path / "fp16")
    loaded = bert().half()
    rw.load_adapter(loaded, tmp_path / "fp16")
    assert {p.dtype for n, p in loaded.named_parameters() if "lora_" in n} == {torch.float16}
    with pytest.warns(UserWarning, match=r"is torch.float16 and becomes torch.float32"):
        rw.load_adapter(bert(), tmp_path / "fp16")

    rw.save_adapter(rw.apply_lora(bert().double(), config), tmp_path / "fp64")
    with pytest.raises(rw.FileError, match="torch.float64 would be rounded to .*torch.float32"):
        rw.load_adapter(bert(), tmp_path / "fp64")


def test_tensors_that_are_not_finite_are_reported(tmp_path):
    model = rw.apply_lora(bert(), rw.LoRAConfig(rank=4, target_modules=["query"]))
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad)[0, 0] = float("nan")
    rw.save_adapter(model, tmp_path)
    with pytest.warns(UserWarning, match="query.lora_A.weight.*NaN"):
        rw.load_adapter(bert(), tmp_path)


def test_the_config_says_nothing_that_peft_does_not_know(tmp_path):
    model = rw.apply_lora(bert(), rw.LoRAConfig(rank=4, alpha=8.0, target_modules=["query", "key"]))
    rw.save_adapter(model, tmp_path)
    ours = json.loads((tmp_path / "adapter_config.json").read_text())
    theirs = peft.LoraConfig.from_pretrained(tmp_path).to_dict()
    assert (theirs["r"], theirs["lora_alpha"]) == (4, 8)
    assert theirs["target_modules"] == {"query", "key"}
    assert ours.keys() <= theirs.keys()


@pytest.mark.parametrize(
    "pattern",
    [{"rank_pattern": {"block.fc": 2, "fc": 3}}, {"alpha_pattern": {"block.fc": 8.0, "fc": 3.0}}],
    ids=["rank", "alpha"],
)
def test_a_path_that_ends_in_another_keeps_its_own_values(tmp_path, pattern):
    # As a pattern in the file, "fc" would mean "block.fc" too.
    def base():
        torch.manual_seed(0)
        block = torch.nn.Sequential(OrderedDict(fc=torch.nn.Linear(4, 4)))
        return torch.nn.Sequential(
            OrderedDict(fc=torch.nn.Linear(4, 4), block=block, last=torch.nn.Linear(4, 4))
        )

    config = rw.LoRAConfig(rank=2, alpha=8.0, target_modules=["fc", "last"], **pattern)
    model = rw.apply_lora(base(), config)
    randomise(model)
    rw.save_adapter(model, tmp_path)
    x = torch.randn(3, 4)
    again = base()
    rw.load_adapter(again, tmp_path)
    assert torch.equal(again(x), model(x))
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(theirs(x), model(x), rtol=0, atol=1e-6)
