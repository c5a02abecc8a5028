"""make gpu's tests and measurements: what they run, and what they read of it."""

from importlib import import_module

import pytest
from bench import MEASUREMENTS
from gpu import measure, sanitizer, test

XML = """<testsuites><testsuite tests="4" failures="1" errors="1" skipped="1">
<testcase classname="cuda.test_a" name="good"/>
<testcase classname="cuda.test_a" name="skips"><skipped message="this device is another"/></testcase>
<testcase classname="cuda.test_a" name="bad"><failure message="assert 1 == 2&#10;more">x</failure></testcase>
<testcase classname="" name="cuda/test_b.py::lost"><error message="worker 'gw1' crashed"/></testcase>
</testsuite></testsuites>"""  # noqa: E501


def test_failures_are_named(tmp_path):
    (tmp_path / "results.xml").write_text(XML)
    found = test.summary(tmp_path / "results.xml")
    failed = {
        "cuda.test_a.bad": "assert 1 == 2",
        ".cuda/test_b.py::lost": "worker 'gw1' crashed",
    }
    assert found == {"tests": 4, "failures": 1, "errors": 1, "skipped": 1} | {
        "failed": failed,
        "skips": {"this device is another": 1},
    }
    rows = test.rows({"device tests": found})
    assert rows[0] == "device tests: 4 tests, 1 failures, 1 errors, 1 skipped"
    assert rows[1] == "  skipped 1: this device is another"
    assert rows[2] == "cuda.test_a.bad: assert 1 == 2"


def test_tests_are_run_by_workers_that_nothing_stops(runner, stages):
    test.test(stages, 120)
    device, *_, others = (set(command) for name, command, _ in runner.commands if "tests" in name)
    assert {"-n", "12", "--dist=load", "tests/python/cuda", "--file-limit=64"} <= device
    assert {"-n", "12", "tests/python", "--ignore=tests/python/cuda"} <= others
    assert not {"-x", "--exitfirst", "--maxfail=1"} & (device | others)
    assert [name for name in runner.names if "tests" in name] == ["device_tests", "other_tests"]


def test_a_stopped_run_of_tests_has_no_counts(runner, stages, monkeypatch):
    """Nothing of an older run is taken for its own."""
    (stages.output / "device_tests.xml").write_text(XML)
    runner.codes["device_tests"] = None
    found = test.device_tests(stages, {}, 30)
    assert found["tests"] == 0
    assert [stage.result for stage in stages.done] == [
        "stopped after 30 s",
        "failed: none has a result",
    ]


@pytest.mark.parametrize(
    "reason, result",
    [
        ("this device is another", []),
        ("no CUDA side", ["failed: skipped: no CUDA side"]),
    ],
)
def test_what_hides_behind_a_skip_is_a_failure(reason, result, runner, stages, monkeypatch):
    def writes(command, log, limit, env):
        (stages.output / "device_tests.xml").write_text(
            XML.replace("this device is another", reason)
        )
        return 0

    stages._run = writes
    test.device_tests(stages, {}, 30)
    assert [stage.result for stage in stages.done[1:]] == result


LOG = """========= COMPUTE-SANITIZER
begin first
end first
left out joined: it needs cuda (sm_90a)
begin second
========= Invalid __global__ write of size 4 bytes
=========     at rankwise::kernels::expand+0x160
=========     by thread (0,0,0) in block (0,0,0)
=========
========= Error: Race reported between Write access at one and Read access at other
=========     and Read access at 0x150
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
========= ERROR SUMMARY: 2 errors
========= Target application returned an error
"""


def test_errors_belong_to_the_problem_in_which_they_are():
    result = {"ran": [], "left out": [], "errors": {}, "finished": False}
    sanitizer.read(LOG.splitlines(), result)
    assert result["ran"] == ["first", "second"] and result["left out"] == ["joined"]
    assert not result["finished"]
    assert result["errors"] == {
        "second": [
            "Invalid __global__ write of size 4 bytes",
            "Error: Race reported between Write access at one and Read access at other",
        ]
    }


def test_a_new_process_takes_the_problems_behind_a_lost_one(runner, stages):
    runner.logs = {"memcheck": LOG, "memcheck_2": "begin third\nend third\nall problems have begun"}
    runner.codes = {"memcheck": 9}
    found = sanitizer.check(stages, "memcheck", {}, 100)
    assert runner.names == ["memcheck", "memcheck_2"]
    assert runner.commands[1][1][-2:] == ["--after", "second"]
    assert found["finished"] and found["ran"] == ["first", "second", "third"]
    rows = test.rows({"sanitizer": {"memcheck": found}})
    assert rows[0] == "memcheck: 3 problems, 2 errors, left out joined"


def test_a_tool_that_never_begins_is_not_started_again(runner, stages):
    runner.codes = {"racecheck": 1}
    found = sanitizer.check(stages, "racecheck", {}, 100)
    assert runner.names == ["racecheck"] and not found["finished"]
    assert test.rows({"sanitizer": {"racecheck": found}}) == [
        "racecheck: 0 problems, not all, 0 errors"
    ]


def test_measurements_have_their_order_and_time(runner, stages, monkeypatch):
    monkeypatch.setattr(measure, "find_spec", lambda name: None if name == "peft" else name)
    (stages.output / "kernels.json").write_text('{"results": "of an older run"}')
    found = measure.measure(stages, 200)
    assert found == {}
    assert runner.names == ["layers_cuda", "kernels", "group"]
    (_, command, limit), *_ = runner.commands
    assert limit == pytest.approx(200 * 8 / 20)
    assert command[command.index("--limit") + 1] == str(int(0.7 * limit))
    left_out = [stage.note for stage in stages.done if stage.result == "left out"]
    assert left_out == ["peft not installed"] * 2


@pytest.mark.parametrize("bench", measure.BENCHES, ids=lambda bench: bench.name)
def test_measurements_take_these_options(bench, stages):
    assert bench.name in MEASUREMENTS
    module = import_module(f"bench.{bench.name}")
    given = measure.command(bench, 100, stages)[4:]
    options = module.MEASUREMENT.options(bench.name, module.__doc__, given)
    assert options.output == stages.output
    assert getattr(options, "device", "cuda") == "cuda"
    assert getattr(options, "limit", 70) == 70
