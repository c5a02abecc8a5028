"""make gpu without a GPU: its parts in their order and time, its commands, and what it prints."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
from gpu import __main__ as door
from gpu import build
from gpu.stages import Budget, run_process
from gpu.tables import LIMIT, table


def test_what_is_left_is_there_for_all_that_follow(runner):
    budget = Budget(100, {"a": 2, "b": 1, "c": 1}, runner.clock)
    assert budget.of("a") == 50
    runner.now = 20  # a took less
    assert budget.of("b") == 40
    runner.now = 90
    assert budget.of("c") == budget.left() == 10
    runner.now = 120
    assert budget.of("c") == 0


@pytest.mark.parametrize(
    "part, seconds, parts",
    [
        ("all", None, {"build": 570 * 4 / 11, "test": 470 * 4 / 7, "measure": 370}),
        ("all", 110, {"build": 40, "test": 10 * 4 / 7, "measure": 0}),
        ("build", None, {"build": 570 * 4 / 11}),
        ("test", None, {"test": 570 * 4 / 11}),
        ("measure", None, {"measure": 570 * 3 / 11}),
        ("measure", 60, {"measure": 60}),
    ],
)
def test_parts_have_their_order_and_time(part, seconds, parts, runner, stages, monkeypatch):
    given = {}

    def run(name):
        def of(stages, seconds, architecture):
            given[name], runner.now = seconds, runner.now + 100
            return {"usable": True}

        return of

    monkeypatch.setattr(door, "PARTS", {name: run(name) for name in door.PARTS})
    monkeypatch.setattr(build, "refusals", lambda site, want: [])
    door.run(part, seconds, "90", stages)
    assert list(given) == list(parts) and given == pytest.approx(parts)


def test_a_part_that_fails_leaves_the_others(stages, monkeypatch):
    def breaks(stages, seconds, architecture):
        raise OSError("no room")

    parts = {"build": lambda *_: {"usable": True}, "test": breaks, "measure": lambda *_: {"a": 1}}
    monkeypatch.setattr(door, "PARTS", parts)
    report = door.run("all", None, "90", stages)
    assert report["measure"] == {"a": 1}
    assert [(s.name, s.result) for s in stages.done] == [("test", "failed: OSError: no room")]


def test_without_a_build_nothing_is_tested(stages, monkeypatch, tmp_path):
    def never(*_):
        raise AssertionError

    monkeypatch.setattr(door, "PARTS", dict.fromkeys(door.PARTS, never))
    door.run("test", None, "90", stages, site=tmp_path)
    assert [s.name for s in stages.done] == ["build", "test"]
    assert stages.done[0].failed and "there is no build.json" in stages.done[0].result


def test_a_failed_stage_is_exit_code_1(tmp_path, monkeypatch, capsys):
    parts = {
        "build": lambda *_: {"usable": True, "refused": []},
        "test": lambda stages, *_: stages.fail("device tests", "2 of 3") or {},
        "measure": lambda *_: {"group": [{"case": "a case", "rows": {}}]},
    }
    monkeypatch.setattr(door, "PARTS", parts)
    monkeypatch.setattr(build, "device_architecture", lambda: "90")
    assert door.main([], tmp_path) == 1
    printed = capsys.readouterr().out
    assert "device tests" in printed and printed.rstrip().endswith("a case:")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["measure"]["group"][0]["case"] == "a case"
    assert [stage["result"] for stage in report["stages"]] == ["failed: 2 of 3"]
    parts["test"] = lambda *_: {}
    assert door.main([], tmp_path) == 0


@pytest.mark.parametrize("part", ["test", "measure", "all"])
def test_a_machine_without_a_gpu_is_told(part, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "device_architecture", lambda: "")
    assert door.main([part], tmp_path) == 1
    assert "PyTorch finds no CUDA device here" in capsys.readouterr().err


def alive(pid: int) -> bool:
    """Not where it has ended and nobody has asked for its status."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_command_is_stopped_at_its_limit_with_all_it_started(tmp_path):
    child = "import time; print('here', flush=True); time.sleep(60)"
    code = (
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, lambda *_: print('interrupted', flush=True) or sys.exit(3))\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "print('child', child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    log, begin = tmp_path / "log", time.monotonic()
    assert run_process([sys.executable, "-c", code], log, 3, dict(os.environ)) is None
    assert time.monotonic() - begin < 30
    words = log.read_text().split()
    assert "interrupted" in words
    pid = int(words[words.index("child") + 1])
    while alive(pid):
        assert time.monotonic() - begin < 30


def test_statuses_of_commands(runner, stages):
    runner.codes = {"fails": 2, "hangs": None}
    assert stages.run("passes", [], 20, {})
    assert not stages.run("fails", [], 20, {})
    assert not stages.run("hangs", [], 7, {})
    assert not stages.run("too late", [], 4, {})
    results = ["passed", "failed with 2", "stopped after 7 s", "left out"]
    assert [stage.result for stage in stages.done] == results
    assert [stage.failed for stage in stages.done] == [False, True, True, False]
    assert "too_late" not in runner.names


def test_a_table_fits_and_says_what_it_lost():
    sections = {"short": ["one", "two"], "long": [f"row {i} {'x' * 300}" for i in range(500)]}
    text = table(sections)
    assert LIMIT - 250 < len(text) <= LIMIT
    assert text.startswith("## short\none\ntwo\n## long\nrow 0 ")
    rows = [line for line in text.splitlines() if line.startswith("row ")]
    assert all(len(row) == 200 for row in rows)
    assert text.endswith(f"({500 - len(rows)} more rows in the JSON)")


def test_a_table_that_fits_is_whole():
    assert table({"a": ["1"], "b": []}) == "## a\n1\n## b"
