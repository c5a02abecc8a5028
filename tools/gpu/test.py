# The second part of make gpu: the device tests, compute-sanitizer, and the rest of the suite.
"""Nothing stops at the first failure. A test that meets an error of the device ends its worker, for
the CUDA context is lost, and a fresh worker takes the other tests (tests/python/cuda/conftest.py);
one that runs past the wall limit of its file ends its worker too (tests/python/file_limits.py).
"""

from __future__ import annotations

import os
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from .build import environment
from .sanitizer import TOOLS, check
from .stages import ROOT, Budget, Environment, Stages

WORKERS = 12
# Of the device tests' time, from the first test of a file to the end of its last: one that hangs
# leaves the others of its worker the rest.
FILE_SHARE = 0.8
DEVICE_TESTS = "tests/python/cuda"
# The rest of the suite but for what needs weights or texts from a registry, or GoogleTest.
OTHER_TESTS = ["tests/python", f"--ignore={DEVICE_TESTS}", "--ignore=tests/python/examples",
               "--ignore=tests/python/consumer", "--ignore=tests/python/parity",
               "--ignore=tests/python/integrations/test_peft_suite.py"]  # fmt: skip
WEIGHTS = {"device tests": 8, "sanitizer": 2, "other tests": 2}


def test(stages: Stages, seconds: float) -> dict:
    """Counts and failures of each stage; most informative first."""
    env, budget = environment(), Budget(seconds, WEIGHTS, stages.clock)
    if find_spec("pytest") is None:
        stages.leave_out("tests", "pytest is not installed")
        return {}
    report = {"device tests": device_tests(stages, env, budget.of("device tests"))}
    report["sanitizer"] = sanitize(stages, env, budget.of("sanitizer"))
    # On a thread for each worker.
    one_thread = env | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    limit = budget.of("other tests")
    report["other tests"] = run_tests(stages, one_thread, "other tests", OTHER_TESTS, limit)
    return report


def device_tests(stages: Stages, env: Environment, limit: float) -> dict:
    """Nothing but failures may hide behind a skip, unless the device is another one's."""
    found = run_tests(stages, env, "device tests", [DEVICE_TESTS], limit, FILE_SHARE * limit)
    hidden = [reason for reason in found["skips"] if not reason.startswith("this device")]
    if found["tests"] == 0:
        stages.fail("device tests", "none has a result")
    elif hidden:
        stages.fail("device tests", f"skipped: {'; '.join(hidden)}")
    return found


def run_tests(
    stages: Stages,
    env: Environment,
    name: str,
    tests: list[str],
    limit: float,
    file_limit: float | None = None,
) -> dict:
    results = stages.log(name).with_suffix(".xml")
    results.unlink(missing_ok=True)
    stages.run(name, pytest_command(tests, results, file_limit), limit, with_plugins(env))
    return summary(results)


def pytest_command(tests: list[str], results: Path, file_limit: float | None) -> list[str]:
    """Of the schedulers, load alone goes on with the next test after a crash."""
    command = [sys.executable, "-m", "pytest", *tests, f"--junitxml={results}", "-rs"]
    if file_limit is not None:
        command += ["-p", "file_limits", f"--file-limit={file_limit:.0f}"]
    if find_spec("xdist"):
        command += ["-n", str(WORKERS), "--dist=load", "--max-worker-restart=200"]
    return command


def with_plugins(env: Environment) -> Environment:
    folders = [env.get("PYTHONPATH", ""), str(ROOT / "tests" / "python")]
    return {**env, "PYTHONPATH": os.pathsep.join(folders).strip(os.pathsep)}


def summary(results: Path) -> dict:
    """Numbers of tests by result, what each failure says, and how often each reason to skip."""
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    if not results.exists():
        return counts | {"failed": {}, "skips": {}}
    suite = ElementTree.parse(results).getroot().find("testsuite")
    failed, skips = {}, Counter()
    for case in suite.iter("testcase"):
        skips.update(_first_line(said) for said in case.findall("skipped"))
        for said in [*case.findall("failure"), *case.findall("error")]:
            name = f"{case.get('classname', '')}.{case.get('name')}"
            failed[name] = _first_line(said)
    return {n: int(suite.get(n, 0)) for n in counts} | {"failed": failed, "skips": skips}


def _first_line(said: ElementTree.Element) -> str:
    return (said.get("message") or "").split("\n")[0][:200]


def sanitize(stages: Stages, env: Environment, limit: float) -> dict:
    """The tools beside each other, each in processes of its own."""
    if shutil.which("compute-sanitizer", path=env["PATH"]) is None:
        for tool in TOOLS:
            stages.leave_out(tool, "compute-sanitizer is not installed")
        return {}
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        running = {tool: pool.submit(check, stages, tool, env, limit) for tool in TOOLS}
        return {tool: future.result() for tool, future in running.items()}


def rows(report: dict) -> list[str]:
    """Counts of all stages first, then what failed."""
    counted, failed = [], []
    for name in ("device tests", "other tests"):
        if found := report.get(name):
            counts = ", ".join(
                f"{found[n]} {n}" for n in ("tests", "failures", "errors", "skipped")
            )
            counted.append(f"{name}: {counts}")
            counted += [f"  skipped {n}: {reason}" for reason, n in found["skips"].items()]
            failed += [f"{test}: {said}" for test, said in found["failed"].items()]
    for tool, found in report.get("sanitizer", {}).items():
        left_out = f", left out {', '.join(found['left out'])}" if found["left out"] else ""
        unfinished = "" if found["finished"] else ", not all"
        counted.append(
            f"{tool}: {len(found['ran'])} problems{unfinished}, "
            f"{sum(map(len, found['errors'].values()))} errors{left_out}"
        )
        failed += [f"{tool}, {name}: {said[0]}" for name, said in found["errors"].items()]
    return counted + failed
