# What the commands print of adapters whose numbers are known, and the JSON of every command: keys
# and types.
import json
import subprocess
import sys

import pytest
import torch
from command_line import run
from model_folders import llama, train
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

import rankwise as rw


def write(folder, B):
    """One module, of singular values 4 and 3 where B is 1."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["m"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    factors = {
        "base_model.model.m.lora_A.weight": torch.eye(2, 3),
        "base_model.model.m.lora_B.weight": B * torch.tensor([[3.0, 0], [0, 4], [0, 0]]),
    }
    save_file(factors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def pair(tmp_path):
    return write(tmp_path / "[one]", 1), write(tmp_path / "two", 2)


def test_analyze(pair):
    assert run("analyze", *pair).output == (
        "module  rank  norm  entropy  stable  90 %  95 %  99 %  phi(1, 1)  phi(r, r)\n"
        "m          2     5     1.98    1.56     2     2     2      1.000      1.000\n"
    )


def test_compare(pair):
    assert run("compare", *pair, code=1).output == (
        "same function  False\n"
        "tolerance      1e-06\n"
        "module  distance  relative\n"
        "m              5       0.5\n"
    )


def test_truncate(pair, tmp_path):
    out = tmp_path / "out"
    assert run("truncate", pair[0], "--rank", 1, "-o", out).output == (
        f"written               {out}\n"
        "rank                  1\n"
        "worst relative error  0.6\n"
        "module  lost  relative\n"
        "m          3       0.6\n"
    )


def test_names_are_no_markup(pair, tmp_path):
    out = tmp_path / "[red]"
    assert f"written       {out}\n" in run("export", pair[0], "-o", out).output


MODULE = {"out_features": int, "in_features": int, "rank": int, "scaling": float,
          "parameters": int, "health": str}  # fmt: skip
SPECTRUM = {"rank": int, "norm": float, "entropy": float, "stable": float, "energy_90": int,
            "energy_95": int, "energy_99": int, "singular_values": [float],
            "shared_first": float, "shared_all": float}  # fmt: skip
MERGED = {"max_rounding_error": float, "changed": int, "total": int, "share_changed": float}
CHECK = {"name": str, "ok": bool, "found": str}
Q = "model.layers.{}.self_attn.q_proj"
# Arguments (ONE, TWO: adapters; BASE, OVER: a model, an adapter over it), exit code, shape.
SHAPES = {
    "inspect ONE": (0, {
        "method": str, "base_model": None, "rank": int, "alpha": float, "rslora": bool,
        "dropout": float, "ranks": {"least": int, "most": int}, "module_count": int,
        "parameters": int, "trained_whole": int, "bytes": int, "dtypes": [str], "health": str,
        "modules": {"m": MODULE},
    }),
    "analyze ONE TWO": (0, {"modules": {"m": SPECTRUM}}),
    "compare ONE TWO": (1, {
        "same_function": bool, "tolerance": float,
        "distances": {"m": {"absolute": float, "relative": float}},
    }),
    "combine ONE TWO -o OUT": (0, {
        "written": str, "method": str, "folders": [str], "weights": [float],
    }),
    "truncate ONE -o OUT --rank 1": (0, {
        "written": str, "rank": int, "worst_relative_error": float,
        "relative_errors": {"m": float},
    }),
    "merge BASE OVER -o OUT": (0, {
        "written": str, **MERGED, "warnings": [], "left_out": [],
        "modules": {Q.format(0): MERGED, Q.format(1): MERGED},
    }),
    "export ONE -o OUT": (0, {
        "written": str, "rank": int, "module_count": int, "dtypes": [str], "trained_whole": [],
    }),
    "verify ONE": (0, {"sound": bool, "checks": [CHECK]}),
    "plan --total-steps 2": (0, {
        "allocations": int, "first": int, "frozen_after": int, "initial_budget": int,
        "final_budget": int, "budgets": {"1": int, "2": int},
    }),
    "doctor": (None, {
        "versions": {"rankwise": str, "torch": str, "Python": str}, "threads": int,
        "processors": int, "cuda_architectures": str, "timed": None,
    }),
}  # fmt: skip


def shape_of(value):
    if isinstance(value, dict):
        return {key: shape_of(own) for key, own in value.items()}
    if isinstance(value, list):
        return [shape_of(own) for own in value[:1]]
    return None if value is None else type(value)


@pytest.mark.parametrize("command", SHAPES)
def test_json(pair, tmp_path, command):
    code, wanted = SHAPES[command]
    paths = {"ONE": pair[0], "TWO": pair[1], "OUT": tmp_path / "out", "BASE": tmp_path / "base",
             "OVER": tmp_path / "over"}  # fmt: skip
    if "BASE" in command:
        config = rw.LoRAConfig(rank=2, target_modules=["q_proj"])
        train(LlamaForCausalLM, llama(paths["BASE"]), paths["OVER"], config)
    result = run(*(paths.get(word, word) for word in command.split()), "--json", code=code)
    found = shape_of(json.loads(result.stdout))
    if command == "doctor":  # devices and packages are the machine's
        assert found.pop("devices") == [{"name": str, "description": str, "paths": {
            dtype: str for dtype in rw.doctor.DTYPES}}]  # fmt: skip
        assert found.pop("packages").keys() == rw.doctor.TESTED.keys()
        assert found.pop("problems") in ([], [str])
    assert found == wanted


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["merge", "/nowhere", "/nowhere", "-o", "/tmp/x"], 1, "/nowhere/config.json"),
        (["merge", "/nowhere"], 2, "Missing argument 'adapter'"),
        (["export", "/nowhere"], 2, "Missing option '--output'"),
        (["combine", "/nowhere", "-o", "/tmp/x"], 1, "rankwise: /nowhere: cannot open the folder"),
        (["compare", "/a", "/b", "--tolerance", "-1"], 2, "Invalid value for '--tolerance'"),
        (["analyze"], 2, "Missing argument 'folder'"),
        (["verify"], 2, "Missing argument 'folder'"),
        (["truncate", "/a", "-o", "/b"], 2, "Missing option '--rank'"),
        (["plan"], 2, "Missing option '--total-steps'"),
        (["doctor", "more"], 2, "more"),
    ],
)
def test_errors_are_messages(arguments, code, message):
    result = run(*arguments, code=code)
    assert message in result.stderr and "Traceback" not in result.output


def test_inspect_imports_little(pair):
    heavy = "{'transformers', 'peft', 'safetensors', 'matplotlib', 'scipy', 'pandas'}"
    code = (
        "import sys; from rankwise.commands import app; "
        f"app(['inspect', {str(pair[0])!r}], standalone_mode=False); "
        f"print(sorted({heavy} & sys.modules.keys()), file=sys.stderr)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stderr == "[]\n"
