# `rankwise sweep`: tables, JSON, the picture, exit codes, and tasks that are none.
import json
from pathlib import Path

import pytest
from test_commands import run

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "sweep_digits.py"
TASK = """
import math
from torch import nn
import rankwise as rw

EXAMPLES = 6
CONFIG = rw.LoRAConfig(target_modules=["q"])

def new_model():
    return nn.ModuleDict({"q": nn.Linear(10, 10), "k": nn.Linear(10, 30)})

def train(config, rate, train, validation, seed):
    if (config.rank, rate) == FAILS:
        raise RuntimeError("diverged")
    return config.rank - abs(math.log10(rate) + 2) + min(validation) / 8
"""
GRID = ["--ranks", "1,2", "--rates", "1e-3,1e-2", "--folds", "2"]


@pytest.fixture
def task(tmp_path):
    """Writes the task's file, and gives its command line; the configuration that fails given."""

    def written(fails=None, without=""):
        file = tmp_path / "task.py"
        lines = f"FAILS = {fails}\n{TASK}".split("\n\n")
        file.write_text("\n\n".join(part for part in lines if not without or without not in part))
        return [file, *GRID, "-o", tmp_path / "out"]

    return written


def test_tables_and_picture(task, tmp_path):
    result = run("sweep", *task())
    out = tmp_path / "out"
    assert result.output == (
        f"results           {out / 'results.jsonl'}\n"
        "trainings         8\n"
        "made now          8\n"
        "failed trainings  0\n"
        "     alpha  parameters  best rate   score  deviation\n"
        "r=1      2          20       0.01  1.0625  +- 0.0884\n"
        "r=2      4          40       0.01  2.0625  +- 0.0884\n"
        "mean score at   0.001    0.01\n"
        "r=1            0.0625  1.0625\n"
        "r=2            1.0625  2.0625\n"
    )
    assert result.stderr == "" and (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    again = json.loads(run("sweep", *task(), "--json").output)
    assert again["made_now"] == 0 and again["pictures"] == [str(out / "sweep.png")]
    assert again["configurations"]["r=2"] == {
        "rank": 2, "alpha": 4.0, "parameters": 40, "best_rate": 0.01,
        "score": 2.0625, "deviation": pytest.approx(0.0884, abs=1e-4),
        "scores": {"0.001": 1.0625, "0.01": 2.0625},
    }  # fmt: skip


def test_results_of_another_version_of_the_task_do_not_count(task):
    command = [*task(), "--json"]
    assert json.loads(run("sweep", *command).output)["made_now"] == 8
    command[0].write_text(command[0].read_text() + "\n# another version")
    assert json.loads(run("sweep", *command).output)["made_now"] == 8
    assert json.loads(run("sweep", *task(), "--json").output)["made_now"] == 0


def test_what_a_task_prints_is_not_in_the_json(task):
    command = task()
    noisy = command[0].read_text().replace("    if (config", "    print(rate)\n    if (config")
    command[0].write_text(f"print('hello')\n{noisy}")
    result = run("sweep", *command, "--json")
    assert json.loads(result.stdout)["made_now"] == 8
    assert result.stderr.splitlines()[:2] == ["hello", "0.001"]


def test_failures_are_told_and_exit_with_1(task):
    command = task(fails=(1, 1e-2))
    assert run("sweep", *command, code=1).output.endswith(
        "r=1      2          20      0.001  0.0625  +- 0.0884\n"
        "r=2      4          40       0.01  2.0625  +- 0.0884\n"
        "mean score at   0.001    0.01\n"
        "r=1            0.0625       -\n"
        "r=2            1.0625  2.0625\n"
        "failed  rate  fold  seed                     why\n"
        "r=1     0.01     0     0  RuntimeError: diverged\n"
        "r=1     0.01     1     0  RuntimeError: diverged\n"
    )
    found = json.loads(run("sweep", *command, "--json", code=1).output)
    assert found["made_now"] == found["failed_trainings"] == 2
    assert found["failed"][0] == {
        "name": "r=1", "rank": 1, "alpha": 2.0, "rate": 0.01, "fold": 0, "seed": 0,
        "error": "RuntimeError: diverged",
    }  # fmt: skip


def test_sets_of_targets_at_an_equal_budget(task, tmp_path):
    options = ["--targets", "q;k", "--budget", "equal", "--alpha", "16", "--json"]
    found = json.loads(run("sweep", *task(), "--ranks", "4", *options).output)
    assert {name: own["parameters"] for name, own in found["configurations"].items()} == {
        "q r=4": 80,
        "k r=2": 80,
    }
    assert {own["alpha"] for own in found["configurations"].values()} == {16}
    assert found["pictures"] == [str(tmp_path / "out" / f"sweep-{place}.png") for place in (1, 2)]


def test_a_task_without_a_model(task):
    lines = run("sweep", *task(without="new_model")).output.splitlines()
    assert lines[5].split() == ["r=1", "2", "-", "0.01", "1.0625", "+-", "0.0884"]
    result = run("sweep", *task(without="new_model"), "--budget", "equal", code=1)
    assert "task.py: --budget equal needs its new_model(), to count parameters" in result.stderr


def test_the_example(tmp_path):
    command = ["sweep", EXAMPLE, "--ranks", "1,8", "--rates", "4e-3", "--folds", "2"]
    found = json.loads(run(*command, "-o", tmp_path, "--json").output)["configurations"]
    assert found["r=8"]["parameters"] == 2048 and found["r=8"]["score"] > 0.9
    assert found["r=8"]["score"] > found["r=1"]["score"] > 0.5


@pytest.mark.parametrize(
    ("text", "arguments", "code", "message"),
    [
        (None, [], 1, "rankwise: [Errno 2] No such file or directory"),
        ("train = 1", [], 1, "task.py: must define EXAMPLES, an integer"),
        ("EXAMPLES = 9", [], 1, "task.py: must define train, a function"),
        ("EXAMPLES = 9\ntrain = 1", [], 1, "task.py: train must be a function, got 1"),
        ("import nowhere_at_all", [], 1, "task.py: ModuleNotFoundError: No module named 'nowhere"),
        (
            "EXAMPLES = 1\ntrain = print",
            [],
            1,
            "sweep: examples must be an integer >= 2, the folds",
        ),
        ("", ["--ranks", "1,x"], 2, "--ranks must be integers separated by commas, got '1,x'"),
        ("", ["--rates", "fast"], 2, "--rates must be numbers separated by commas, got 'fast'"),
        ("", ["--budget", "none"], 2, "Invalid value for '--budget'"),
        ("", ["--folds", "1"], 2, "Invalid value for '--folds'"),
        ("EXAMPLES = 9\ntrain = print", ["--alpha", "x"], 1, 'alpha must be a number, "r" or'),
    ],
)
def test_errors_are_messages(tmp_path, text, arguments, code, message):
    if text is not None:
        (tmp_path / "task.py").write_text(text)
    command = [tmp_path / "task.py", *GRID, "-o", tmp_path / "out", *arguments]
    result = run("sweep", *command, code=code)
    assert message in result.stderr and "Traceback" not in result.output
