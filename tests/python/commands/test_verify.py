# `rankwise verify`: sound folders of ours and of PEFT pass; each fault is found and named.
import json
import math
import shutil

import peft
import pytest
import torch
import transformers
from command_line import run
from model_folders import bert, llama, train
from safetensors.torch import load_file, save_file

import rankwise as rw

LLAMA = transformers.LlamaForCausalLM
QUERY = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.fixture
def pair(tmp_path):
    base = llama(tmp_path / "base", max_shard_size="12KB")
    config = rw.LoRAConfig(rank=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    return base, train(LLAMA, base, tmp_path / "adapter", config)


def problems(*arguments):
    found = json.loads(run("verify", *arguments, "--json", code=1).stdout)
    assert found["sound"] is False
    return {check["name"]: check["found"] for check in found["checks"] if not check["ok"]}


def test_a_sound_folder(pair):
    base, adapter = pair
    assert run("verify", adapter, "--model", base).output == (
        "sound  True\n"
        "save finished  ok       yes\n"
        "files          ok       5 tensors, 2 adapted modules\n"
        "checksums      ok       right\n"
        "options        ok       all known\n"
        "targets        ok       all 1 have factors\n"
        "trained whole  ok       1 tensors\n"
        "values         ok       all finite\n"
        "dtypes         ok       5 float32\n"
        "model          ok       has a place for all 3\n"
    )


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(target_modules=["query"], modules_to_save=["classifier"]),
        peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS"),
        peft.LoraConfig(target_modules=r".*layer\.1.*(key|dense)", rank_pattern={"key": 3}),
        peft.LoraConfig(target_modules=["query"], layers_to_transform=[1]),
        peft.AdaLoraConfig(target_modules=["query", "word_embeddings"][:1], total_step=9),
        peft.LoraConfig(target_modules="all-linear", exclude_modules=["key"]),
    ],
    ids=["whole", "task", "pattern", "layers", "adalora", "all"],
)
def test_what_peft_wrote_is_sound(tmp_path, config):
    kind = transformers.BertForSequenceClassification
    base = bert(tmp_path / "base", kind)
    adapter = train(kind, base, tmp_path / "adapter", config)
    found = json.loads(run("verify", adapter, "--model", base, "--json").stdout)
    assert found["sound"] is True
    assert found["checks"][2]["found"] == "none, as another program wrote it"


def resave(adapter, change):
    """Other tensors, and no checksums, as another program would write."""
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit(adapter, **values):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def put(key, value):
    return lambda tensors: tensors.__setitem__(key, value)


FAULTS = {
    "a byte of a tensor": (
        lambda a: flip(a / "adapter_model.safetensors", -1),
        "files",
        "damaged, or changed since it was saved: rankwise.tensors_checksum",
    ),
    "a byte of the header": (
        lambda a: flip(a / "adapter_model.safetensors", 9), "files", "adapter_model.safetensors"
    ),
    "the configuration": (
        lambda a: edit(a, lora_alpha=99), "files", "rankwise.config_checksum must be"
    ),
    "a short file": (
        lambda a: (a / "adapter_model.safetensors").write_bytes(b"short"), "files", "must"
    ),
    "no tensors": (
        lambda a: (a / "adapter_model.safetensors").unlink(), "files", "no such file"
    ),
    "a missing factor": (
        lambda a: resave(a, lambda t: t.pop(f"{QUERY}.lora_B.weight")),
        "files",
        f'"{QUERY}.lora_B.weight": missing',
    ),
    "a wrong shape": (
        lambda a: resave(a, put(f"{QUERY}.lora_A.weight", torch.ones(3, 16))),
        "files",
        f'"{QUERY}.lora_A.weight": must be [2, in], got [3, 16]',
    ),
    "an orphan": (
        lambda a: resave(a, put("somewhere.weight", torch.ones(2))),
        "files",
        "not a tensor of a PEFT LoRA adapter",
    ),
    "a value": (
        lambda a: resave(a, put(f"{QUERY}.lora_A.weight", torch.full((2, 16), math.nan))),
        "values",
        f"{QUERY}.lora_A.weight: infinite or NaN",
    ),
    "an unknown option": (
        lambda a: (resave(a, dict.copy), edit(a, use_new_thing=True)), "options", "use_new_thing"
    ),
    "a target without factors": (
        lambda a: (resave(a, dict.copy), edit(a, target_modules=["q_proj", "v_proj"])),
        "targets",
        "v_proj: has no factors",
    ),
    "factors without a target": (
        lambda a: (resave(a, dict.copy), edit(a, target_modules=["layers.0.self_attn.q_proj"])),
        "targets",
        "model.layers.1.self_attn.q_proj: is no target",
    ),
    "no tensors of a module trained whole": (
        lambda a: resave(a, lambda t: t.pop("base_model.model.lm_head.weight")),
        "trained whole",
        "lm_head: has no tensors",
    ),
    "an unfinished save": (
        lambda a: (a / ".rankwise-save.adapter_config.json").touch(),
        "save finished",
        ".rankwise-save.adapter_config.json; the next save into the folder settles it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_folder(pair, fault):
    spoil, check, message = FAULTS[fault]
    spoil(pair[1])
    found = problems(pair[1])
    assert list(found) == [check] and message in found[check]


def test_faults_against_the_model(pair, tmp_path):
    base, adapter = pair
    resave(adapter, put(f"{QUERY}.lora_A.weight", torch.ones(2, 12)))
    assert (
        "layers.1.self_attn.q_proj.weight: must be [16, 12]"
        in problems(adapter, "--model", base)["model"]
    )
    resave(adapter, lambda t: [t.pop(key) for key in list(t) if QUERY in key])
    assert problems(adapter, "--model", base) == {
        "model": "model.layers.1.self_attn.q_proj: is a target without factors"
    }
    other = bert(tmp_path / "other")
    assert "the model has no such tensor" in problems(adapter, "--model", other)["model"]
    shutil.rmtree(other)
    assert "config.json" in run("verify", adapter, "--model", other, code=1).stderr


def test_a_folder_that_is_none(tmp_path):
    error = run("verify", tmp_path / "nowhere", code=1).stderr
    assert error == f"rankwise: {tmp_path / 'nowhere'}: cannot open the folder: no such folder\n"
