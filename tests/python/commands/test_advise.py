# `rankwise advise`: its table, its JSON, the pattern's file, and its errors.
import json

import peft
import pytest
import torch
from test_commands import run

import rankwise as rw


@pytest.fixture
def trained(tmp_path):
    """Two seeds of one training: layer "a" agrees on two directions, "b" on none."""
    for seed in (1, 2):
        torch.manual_seed(0)
        shared = torch.linalg.qr(torch.randn(40, 2))[0].t()
        model = torch.nn.ModuleDict({n: torch.nn.Linear(40, 40) for n in ("a", "b")})
        rw.apply_lora(model, rw.LoRAConfig(rank=3, alpha=3.0, target_modules=["a", "b"]))
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, energy in (("a", 4.0), ("b", 1.0)):
                A, B = torch.randn(3, 40), torch.linalg.qr(torch.randn(40, 3))[0]
                A = torch.linalg.qr((torch.cat([shared, A[2:]]) if name == "a" else A).t())[0].t()
                model[name].lora_A.copy_(A)
                model[name].lora_B.copy_(B * torch.tensor([energy, energy, 0.5]))
        rw.save_adapter(model, tmp_path / str(seed))
    return tmp_path


def test_from_one_folder(trained):
    file = trained / "pattern.json"
    printed = run("advise", trained / "1", "--budget", 250, "-o", file).output
    assert printed == (
        "evidence         energy\n"
        "budget           250\n"
        "spent            240\n"
        f"written          {file}\n"
        "module  out x in  rank  parameters  energy\n"
        "a        40 x 40     2         160   32.25\n"
        "b        40 x 40     1          80    2.25\n"
    )
    pattern = json.loads(file.read_text())
    assert pattern == {"a": 2, "b": 1}
    model = torch.nn.ModuleDict({n: torch.nn.Linear(40, 40) for n in ("a", "b")})
    config = peft.LoraConfig(r=8, rank_pattern=pattern, target_modules=["a", "b"])
    theirs = peft.inject_adapter_in_model(config, model)
    assert {n: theirs[n].r["default"] for n in ("a", "b")} == pattern


def test_from_two_seeds(trained):
    found = json.loads(
        run(
            "advise", trained / "1", trained / "2", "--mean-rank", 2, "--min-rank", 0, "--json"
        ).output
    )
    assert found == {
        "evidence": "directions agreed on",
        "budget": 320,
        "spent": 320,
        "written": None,
        "rank_pattern": {"a": 4},
        "exclude_modules": "b",
        "modules": {"a": {"rank": 4, "score": 2.0}, "b": {"rank": 0, "score": 0.0}},
    }


def test_from_the_outputs_of_two_seeds(trained):
    """Which are random in both."""
    command = ["advise", trained / "1", trained / "2", "--mean-rank", 2, "--of", "output", "--json"]
    found = json.loads(run(*command).output)
    assert {module["score"] for module in found["modules"].values()} == {0.0}
    assert found["rank_pattern"] == {"a": 1, "b": 1} and found["spent"] == 160


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["/nowhere", "--budget", 9], 1, "rankwise: /nowhere: cannot open the folder"),
        (["/nowhere"], 2, "one of --budget and --mean-rank must be given"),
        (["/nowhere", "--budget", 9, "--mean-rank", 1], 2, "one of --budget and --mean-rank"),
    ],
)
def test_errors_are_messages(arguments, code, message):
    result = run("advise", *arguments, code=code)
    assert message in result.stderr and "Traceback" not in result.output


def test_a_budget_below_the_least(trained):
    result = run("advise", trained / "1", "--budget", 100, code=1)
    assert "rankwise: rank_advice: budget must be at least 160" in result.stderr
