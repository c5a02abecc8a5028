# `rankwise merge` as a process: killed in the middle, and how much memory it takes.
import json
import os
import signal
import subprocess
import sys

import torch
import transformers
from command_line import run
from model_folders import llama, merged_in_memory, same_bits, train
from safetensors.torch import load_file, save_file

import rankwise as rw

LLAMA = transformers.LlamaForCausalLM

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


def test_a_kill_leaves_nothing_in_the_way(tmp_path):
    base = llama(tmp_path / "base")
    adapter = train(LLAMA, base, tmp_path / "adapter", rw.LoRAConfig(target_modules=["q_proj"]))
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
    """Four files of 16 zero matrices of size x size each, and an adapter that adds one."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    placed, factors = {}, {}
    for shard in "abcd":
        tensors = {f"{shard}{i}.weight": torch.zeros(size, size) for i in range(16)}
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
    assert load_file(tmp_path / "large/out/d.safetensors")["d15.weight"].eq(1).all()
    shard = (tmp_path / "large/base/a.safetensors").stat().st_size
    assert 1024 * int(found.stderr.split()[-1]) < 1.2 * shard
