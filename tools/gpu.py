"""make gpu: builds for the GPU at hand, tests, checks memory accesses, measures.

The device's own tests come first, then the whole suite with that build, then the measurements:
every shape, rank and dropout of tests/bench/layers_cuda.py for which there is time.

Needs a CUDA device, nvcc, and a python3 with torch, pip, setuptools, cmake, ninja, pytest, numpy;
no network. Everything is written to build/gpu; report.json has one entry for each stage.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import xml.etree.ElementTree as ElementTree
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "build" / "gpu"
SITE = OUTPUT / "site"
HEADERS = ROOT / "build" / "headers"  # make gpu-headers
DEADLINE = 570.0  # seconds for everything
DEVICE_TESTS = "tests/python/cuda"
# The rest of the suite but for what needs weights or texts from a registry, or GoogleTest.
OTHER_TESTS = ["tests/python", f"--ignore={DEVICE_TESTS}", "--ignore=tests/python/examples",
               "--ignore=tests/python/consumer", "--ignore=tests/python/parity",
               "--ignore=tests/python/integrations/test_peft_suite.py"]  # fmt: skip
# Small problems of every kernel: a checked access costs a thousand plain ones.
CHECKED = [
    "-k",
    "test_inactive_directions or test_any_alignment or test_nan or test_averages_have"
    " or test_the_choice_is or test_masks or test_the_schedule_is or test_the_history_is"
    " or test_the_orthogonality_penalty_and",
]
SANITIZER = ["compute-sanitizer", "--error-exitcode", "9", "--kernel-regex", "kns=rankwise"]


class Stages:
    """Runs commands until the deadline and keeps what became of them."""

    def __init__(self) -> None:
        self.start, self.done = time.monotonic(), []

    def left(self) -> float:
        return DEADLINE - (time.monotonic() - self.start)

    def leave_out(self, name: str, reason: str) -> None:
        self.done.append({"stage": name, "result": "left out", "note": reason})
        print(f"{name}: left out, {reason}", flush=True)

    def run(self, name: str, command: list[str], limit: float, env: dict[str, str]) -> bool:
        log = OUTPUT / f"{name}.log"
        limit, begin = min(limit, self.left()), time.monotonic()
        if limit < 5:
            self.leave_out(name, "no time was left for it")
            return False
        print(f"{name} ...", flush=True)
        with log.open("w") as file:
            try:
                code = subprocess.run(
                    command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, timeout=limit
                ).returncode
                result = "passed" if code == 0 else f"failed with {code}"
            except subprocess.TimeoutExpired:
                result = f"stopped after {limit:.0f} s"
        entry = {"stage": name, "result": result, "seconds": round(time.monotonic() - begin, 1)}
        self.done.append(entry | {"note": str(log.relative_to(ROOT))})
        if result != "passed":
            print("".join(log.read_text(errors="replace").splitlines(keepends=True)[-25:]))
        return result == "passed"


def machine() -> dict[str, str]:
    major, minor = torch.cuda.get_device_capability()
    return {
        "device": torch.cuda.get_device_name(),
        "architecture": f"sm_{major}{minor}",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "python": sys.version.split()[0],
    }


def environment() -> dict[str, str]:
    """Tools of this Python and the CUDA toolkit on the path; the package in build/gpu/site."""
    env = {"RANKWISE_TERM_PRODUCT": "on", **os.environ}
    folders = [sysconfig.get_path("scripts"), env["PATH"], "/usr/local/cuda/bin"]
    env["PATH"] = os.pathsep.join(folders)
    env["PYTHONPATH"] = os.pathsep.join([str(SITE), env.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    major, minor = torch.cuda.get_device_capability()
    env.setdefault("RANKWISE_CUDA_ARCHITECTURES", f"{major}{minor}-real")
    env.setdefault("MAX_JOBS", str(os.cpu_count()))
    env["RANKWISE_WITH_CUDA"] = "on"
    if find_spec("nlohmann_json") is None and (HEADERS / "nlohmann" / "json.hpp").exists():
        env.setdefault("RANKWISE_JSON_INCLUDE_DIR", str(HEADERS))
    return env


def build(stages: Stages, env: dict[str, str]) -> bool:
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-index"]
    options = ["--no-build-isolation", "--no-deps", "--upgrade", "--target", str(SITE), "-v", "."]
    return stages.run("build", pip + options, 300, env)


def pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", *arguments]


def test(stages: Stages, env: dict[str, str], name: str, tests: list[str], workers: int) -> dict:
    """Numbers of tests by result."""
    results = OUTPUT / f"{name}.xml"
    # A worker ends with its CUDA context; of the schedulers, load alone goes on with the next test.
    spread = ["-n", str(workers), "--dist=load", "--max-worker-restart=100"]
    spread = spread if find_spec("xdist") else []
    stages.run(name, pytest(*tests, f"--junitxml={results}", "-rs", *spread), 180, env)
    if not results.exists():
        return {}
    suite = ElementTree.parse(results).getroot().find("testsuite")
    return {n: int(suite.get(n)) for n in ("tests", "failures", "errors", "skipped")}


def test_device(stages: Stages, env: dict[str, str]) -> dict:
    """Nothing but failures may hide behind a skipped file."""
    counts = test(stages, env, "device tests", [DEVICE_TESTS], workers=4)
    if counts and (counts["skipped"] or not counts["tests"]):
        stages.done[-1]["result"] = f"failed: {counts['skipped']} of {counts['tests']} skipped"
    return counts


def test_rest(stages: Stages, env: dict[str, str]) -> dict:
    """On a thread for each worker, as many as there are cores."""
    one_thread = env | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return test(stages, one_thread, "other tests", OTHER_TESTS, workers=os.cpu_count() or 1)


def sanitize(stages: Stages, env: dict[str, str]) -> None:
    # Each tensor its own allocation, so that an access beyond it is seen.
    checked = env | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in ("memcheck", "racecheck"):
        if shutil.which(SANITIZER[0], path=env["PATH"]) is None:
            stages.leave_out(tool, "compute-sanitizer is not installed")
        else:
            command = [*SANITIZER, "--tool", tool, *pytest(DEVICE_TESTS, "-x", *CHECKED)]
            stages.run(tool, command, 60, checked)


def measure(stages: Stages, env: dict[str, str]) -> dict:
    """The allocator at Llama-2-7B's shapes, then layers while there is time."""
    found = {}
    allocator = ["--device", "cuda", "--models", "Llama-2-7B", "--repeats", "10"]
    if find_spec("peft") and find_spec("transformers"):
        found["allocator"] = bench(stages, env, "allocator", allocator, 60)
    else:
        stages.leave_out("allocator", "PEFT or transformers is not installed")
    layers = ["--limit", str(max(1, int(stages.left() - 10)))]
    return found | {"bench": bench(stages, env, "layers_cuda", layers, 400)}


def bench(stages: Stages, env: dict[str, str], name: str, options: list[str], limit: float):
    """What the measurement `name` of tests/bench wrote; its tables are printed."""
    command = [sys.executable, "-m", "bench", name, *options, "--output", str(OUTPUT)]
    with_tests = env | {"PYTHONPATH": os.pathsep.join([env["PYTHONPATH"], str(ROOT / "tests")])}
    stages.run(name, command, limit, with_tests)
    log, result = OUTPUT / f"{name}.log", OUTPUT / f"{name}.json"
    print(log.read_text() if log.exists() else "")
    return json.loads(result.read_text()) if result.exists() else None


def main() -> int:
    if not torch.cuda.is_available():
        print("make gpu: PyTorch finds no CUDA device here", file=sys.stderr)
        return 1
    OUTPUT.mkdir(parents=True, exist_ok=True)
    stages, env = Stages(), environment()
    report: dict = {"machine": machine(), "stages": stages.done}
    if build(stages, env):
        if find_spec("pytest"):
            report["device tests"] = test_device(stages, env)
            sanitize(stages, env)
            report["other tests"] = test_rest(stages, env)
        else:
            stages.leave_out("tests", "pytest is not installed")
        report |= measure(stages, env)
    (OUTPUT / "report.json").write_text(json.dumps(report, indent=1))
    for entry in stages.done:
        print("{stage:12} {result:24} {note}".format(**entry))
    for name in ("device tests", "other tests"):
        print(f"{name}:", report.get(name, "not run"))
    print(OUTPUT / "report.json")
    return int(any(e["result"] not in ("passed", "left out") for e in stages.done))


if __name__ == "__main__":
    sys.exit(main())
