# `rankwise merge`: what it refuses, by name, with nothing written.
import json
import os
import shutil

import pytest
import torch
import transformers
from command_line import run
from model_folders import bert, edit_config, llama, train
from safetensors.torch import load_file, save_file

import rankwise as rw

LLAMA = transformers.LlamaForCausalLM


@pytest.fixture
def pair(tmp_path):
    base = llama(tmp_path / "base")
    return base, train(LLAMA, base, tmp_path / "adapter", rw.LoRAConfig(target_modules=["q_proj"]))


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
