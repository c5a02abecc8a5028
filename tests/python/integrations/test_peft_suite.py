# The plugin for PEFT's own tests, and a slice of them with our layers beside stock PEFT's.
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SUITE = """
import pytest, socket, torch, peft
from torch import nn

@pytest.fixture
def model():
    layers = nn.Sequential(nn.Linear(4, 4))
    return peft.get_peft_model(layers, peft.LoraConfig(target_modules=["0"]))

def test_a_layer(model):
    model(torch.ones(2, 4))
    model.merge_adapter()
    model(torch.ones(2, 4))

def test_ours(model):
    assert type(model.base_model.model[0]).__module__.startswith("rankwise.")

def test_the_hub():
    socket.create_connection(("example.org", 80), timeout=1)

def test_seeds():
    assert torch.initial_seed() == 0

def test_what_may_be_absent():
    from datasets import load_dataset
    from diffusers import StableDiffusionPipeline
"""


def run(*command) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, cwd=ROOT
    )


def outcomes(folder: Path, layers: str) -> dict[str, tuple[str, dict]]:
    suite, results = folder / "test_suite.py", folder / f"{layers}.jsonl"
    plugin = ["-p", "no:cacheprovider", "-p", "rankwise.testing.peft_plugin"]
    options = ["--peft-layers", layers, "--peft-results", str(results), "-c", os.devnull]
    run("-m", "pytest", "-q", *plugin, *options, str(suite))
    lines = map(json.loads, results.read_text().splitlines())
    return {x["test"].split("::")[1]: (x["outcome"], x["calls"]) for x in lines}


def test_the_plugin_runs_suites_with_either_layers(tmp_path):
    (tmp_path / "test_suite.py").write_text(SUITE)
    with ThreadPoolExecutor() as pool:
        ours, stock = pool.map(lambda layers: outcomes(tmp_path, layers), ["rankwise", "stock"])
    assert ours["test_a_layer"] == ("passed", {"fused": 1, "merged": 1})
    assert stock["test_a_layer"] == ("passed", {})
    assert [found["test_ours"][0] for found in (ours, stock)] == ["passed", "failed"]
    for found in (ours, stock):
        assert found["test_the_hub"][0] == "failed"
        assert found["test_seeds"][0] == found["test_what_may_be_absent"][0] == "passed"


def test_a_slice_of_pefts_tests():
    ended = run("tools/peft_tests.py", "--slice")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads((ROOT / "build" / "peft" / "slice.json").read_text())
    assert report["failed with ours alone"] == [] and report["passed"]["rankwise"] > 100
    assert report["computed by our operators"] >= 0.98 * report["eligible calls"] > 400
