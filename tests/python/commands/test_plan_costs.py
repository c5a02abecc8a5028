# What `rankwise plan --model` tells of a training's costs.
import json

import pytest
import torch
from command_line import run
from model_folders import llama

LAYERS = {(16, 16): 2 * 2, (16, 8): 2 * 2, (16, 24): 2 * 2, (24, 16): 2}  # of llama(), no head
HALVES = sum(count * (n_in + n_out) for (n_in, n_out), count in LAYERS.items())


@pytest.fixture
def folder(tmp_path):
    return llama(tmp_path / "model", dtype=torch.bfloat16, max_shard_size="2kB")


def test_costs_are_those_of_the_model(folder):
    options = ["--total-steps", 10, "--initial-rank", 3, "--target-rank", 2, "--model", folder]
    found = json.loads(run("plan", *options, "--tokens", 100, "--json").output)
    head = 16 * 48
    weights = sum(count * n_in * n_out for (n_in, n_out), count in LAYERS.items())
    parameters = weights + 2 * head + (2 * 2 + 1) * 16  # embedding and head, norms
    trained = 3 * (HALVES + 14)  # lora_E too
    assert found["adapters"] == 14 and found["initial_budget"] == 3 * 14
    assert found["trainable"] == trained and found["parameters"] == parameters
    assert found["weight_bytes"] == 2 * parameters
    assert found["training_bytes"] == 4 * 4 * trained  # float32 over 16 bits
    assert found["hidden_bytes"] == 100 * 3 * 14 * 2
    assert found["full_training_bytes"] == 3 * 2 * parameters
    assert found["arithmetic_share"] == pytest.approx(1.5 * 3 * HALVES / (weights + head))


def test_targets_and_times(folder):
    options = ["--total-steps", 10, "--model", folder, "--targets", "q_proj,v_proj", "--tokens", 8]
    found = json.loads(run("plan", *options, "--measure", "--json").output)
    assert found["adapters"] == 4 and found["trainable"] == 12 * 2 * (16 + 16 + 16 + 8 + 2)
    assert found["frozen_seconds"] > 0 and found["adapted_seconds"] > 0
    lines = run("plan", *options).output.splitlines()
    assert "adapters             4" in lines and not any("seconds" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--measure"], 2, "--measure needs --model"),
        (["--model", "/nowhere"], 1, "rankwise: [Errno 2]"),
    ],
)
def test_errors(arguments, code, message):
    result = run("plan", "--total-steps", 10, *arguments, code=code)
    assert message in result.stderr


def test_a_model_that_transformers_does_not_know(folder):
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["Unknown"]}
    (folder / "config.json").write_text(json.dumps(config))
    result = run("plan", "--total-steps", 10, "--model", folder, code=1)
    assert "transformers cannot make this model: AttributeError" in result.stderr
