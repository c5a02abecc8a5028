"""make peft-tests: PEFT's own tests with its layers and with ours, and what differs.

The tests are those of the installed PEFT's source distribution, from the package registry. They run
twice under rankwise.testing.peft_plugin, each in a process of its own. Fails where one fails with
our layers alone, or where less than 98 % of the calls that our operators are meant for got there.

Everything is written to build/peft; all.json has the counts and the names.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "build" / "peft"
FILES = ["custom_models", "mixed", "lora_conversion", "lora_variants", "loraplus", "initialization"]
# Other methods of PEFT's, whose names have "lora" in them.
OTHERS = [
    "gralora",
    "glora",
    "vblora",
    "unilora",
    "tinylora",
    "delora",
    "randlora",
    "vera",
    "xlora",
]
SELECTION = f"lora and not ({' or '.join(OTHERS)})"
# A minute's worth, in both runs together.
SLICE = (
    "(test_forward_output_finite or test_training_custom or test_multiple_adapters or Mixed) and "
    f"({SELECTION})"
)
WANTED_SHARE = 0.98


@dataclass
class Run:
    """The outcomes and calls of one run: {test: ...}."""

    failed: set[str]
    passed: set[str]
    calls: dict[str, Counter[str]]
    seconds: float


def tests_of_peft() -> Path:
    """The folder of PEFT's tests, a package; fetched once for each version."""
    name = f"peft-{version('peft')}"
    folder = OUTPUT / name / "tests"
    if not folder.exists():
        command = ["download", "-q", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
        where = ["-d", str(OUTPUT), f"peft=={version('peft')}"]
        subprocess.run([sys.executable, "-m", "pip", *command, *where], check=True)
        with tarfile.open(OUTPUT / f"{name}.tar.gz") as archive:
            members = [m for m in archive if m.name.startswith(f"{name}/tests/")]
            archive.extractall(OUTPUT, members, filter="data")
        (folder / "__init__.py").touch()
    return folder


def run(name: str, layers: str, tests: Path, files: list[str], selection: str) -> Run:
    results, log = (OUTPUT / f"{name}-{layers}.{kind}" for kind in ("jsonl", "log"))
    results.unlink(missing_ok=True)
    begin = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(tests.parent)]
    command += [
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "rankwise.testing.peft_plugin",
        "-W",
        "ignore",
    ]
    command += ["--peft-layers", layers, "--peft-results", str(results), "-k", selection, *files]
    # With this process's packages, outside of the checkout's settings and of anyone's plugins.
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
        "OMP_NUM_THREADS": "1",
        "PYTEST_ADDOPTS": "",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    with open(log, "w") as file:
        ended = subprocess.run(command, cwd=tests.parent, env=environment, stdout=file, stderr=file)
    if ended.returncode not in (0, 1):
        raise SystemExit(f"pytest ended with {ended.returncode}:\n{log.read_text()[-3000:]}")
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    failed = {line["test"] for line in lines if line["outcome"] == "failed"}
    passed = {line["test"] for line in lines if line["outcome"] == "passed"} - failed
    calls = {line["test"]: Counter(line["calls"]) for line in lines}
    return Run(failed, passed, calls, time.monotonic() - begin)


def compare(stock: Run, ours: Run, ineligible: frozenset[str]) -> dict:
    calls = sum(ours.calls.values(), Counter())
    eligible = sum(n for reason, n in calls.items() if reason not in ineligible)
    return {
        "versions": {name: version(name) for name in ("peft", "transformers", "torch")},
        "date": time.strftime("%Y-%m-%d"),
        "passed": {"stock": len(stock.passed), "rankwise": len(ours.passed)},
        "failed": {"stock": len(stock.failed), "rankwise": len(ours.failed)},
        "failed with ours alone": sorted(ours.failed - stock.failed),
        "passed with ours alone": sorted(stock.failed - ours.failed),
        "calls": dict(calls.most_common()),
        "eligible calls": eligible,
        "computed by our operators": calls["fused"],
        "seconds": {"stock": round(stock.seconds), "rankwise": round(ours.seconds)},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--slice", action="store_true", help="a minute's worth")
    chosen = parser.parse_args()
    from rankwise.integrations.peft.decision import INELIGIBLE

    OUTPUT.mkdir(parents=True, exist_ok=True)
    tests = tests_of_peft()
    name, parts, selection = (
        ("slice", FILES[:2], SLICE) if chosen.slice else ("all", FILES, SELECTION)
    )
    files = [f"tests/test_{part}.py" for part in parts]
    with ThreadPoolExecutor() as pool:  # of processes with a thread each
        runs = [pool.submit(run, name, x, tests, files, selection) for x in ("stock", "rankwise")]
    stock, ours = (each.result() for each in runs)
    report = compare(stock, ours, INELIGIBLE)
    (OUTPUT / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    share = report["computed by our operators"] / max(report["eligible calls"], 1)
    return int(bool(report["failed with ours alone"]) or share < WANTED_SHARE)


if __name__ == "__main__":
    sys.exit(main())
