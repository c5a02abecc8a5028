# compute-sanitizer over tests/python/cuda/small_problems.py, which launch every kernel.
from __future__ import annotations

import re
import sys
from collections.abc import Iterable

from .stages import LEAST, ROOT, Environment, Stages

TOOLS = {
    # Each tensor its own allocation, so that an access beyond it is seen.
    "memcheck": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    "racecheck": {},
    "synccheck": {},
}
PROBLEMS = ROOT / "tests" / "python" / "cuda" / "small_problems.py"
# An error ends the kernel alone, so that the problems behind it are checked too.
SANITIZER = ["compute-sanitizer", "--error-exitcode", "9", "--kernel-regex", "kns=rankwise",
             "--destroy-on-device-error", "kernel", "--print-limit", "100"]  # fmt: skip
FOUND = re.compile(
    r"={9} (?!COMPUTE-SANITIZER|ERROR SUMMARY|RACECHECK SUMMARY|Target application)\S"
)


def check(stages: Stages, tool: str, env: Environment, limit: float) -> dict:
    """Runs all problems. One that ends its process is behind: a new process takes the next."""
    end, after, attempts = stages.clock() + limit, None, 0
    result: dict = {"ran": [], "left out": [], "errors": {}, "finished": False}
    while not result["finished"]:
        name = f"{tool} {attempts + 1}" if attempts else tool
        command = [*SANITIZER, "--tool", tool, sys.executable, str(PROBLEMS)]
        command += ["--after", after] if after else []
        begun = len(result["ran"])
        left = end - stages.clock()
        stages.run(name, command, left, {**env, **TOOLS[tool]})
        if left < LEAST or not stages.log(name).exists():
            break
        read(stages.log(name).read_text(errors="replace").splitlines(), result)
        if len(result["ran"]) == begun or stages.clock() >= end:
            break  # it fails before its first problem
        after, attempts = result["ran"][-1], attempts + 1
    return result


def read(lines: Iterable[str], result: dict) -> None:
    """Adds what a log says: the problems that began, and the errors in each."""
    for line in lines:
        if line.startswith("begin "):
            result["ran"].append(line.removeprefix("begin "))
        elif line.startswith("left out "):
            result["left out"].append(line.removeprefix("left out ").split(":")[0])
        elif line == "all problems have begun":
            result["finished"] = True
        elif FOUND.match(line):
            name = result["ran"][-1] if result["ran"] else "before the first problem"
            result["errors"].setdefault(name, []).append(line.strip("= "))
