"""Checks who includes and imports whom (docs/architecture.md): prints breaches, exits 1 if any."""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PYTHON = r"pybind11|Python\.h"
TORCH = r"ATen|torch|c10"
# room -> (own files it may include by path, beside its own; libraries it may not). The innermost
# room counts: csrc/ops says nothing of csrc/ops/cpu.
ROOMS = {
    "csrc/include": (r"", PYTHON),
    "csrc/kernels": (r"", rf"{PYTHON}|{TORCH}"),
    "csrc/kernels/allocation": (r"kernels/[^/]+\.h", rf"{PYTHON}|{TORCH}"),
    "csrc/ops": (r"kernels/.+\.h|ops/cpu/blocks\.h", PYTHON),
    "csrc/ops/cpu": (r"kernels/.+\.h|ops/[^/]+\.h", PYTHON),
    "csrc/ops/cuda": (r"kernels/.+\.h|ops/[^/]+\.h", PYTHON),
    "csrc/allocation": (r"ops/(importance|cpu/blocks)\.h", PYTHON),
    "csrc/analysis": (r"allocation/spectrum\.h|ops/cpu/blocks\.h", PYTHON),
    "csrc/io": (r"", rf"{PYTHON}|torch/"),
    "csrc/nn": (r"", PYTHON),
    "csrc/bindings": (r"", r"ATen/native"),
}
# Never in <>.
PRIVATE = re.compile(r"(\.\./|allocation|analysis|bindings|io|kernels|nn|ops)(/.*|$)")
TORCH_FREE = re.compile(r"csrc/io/(?!(adapter_(file|fold|tensors)|tensor_file)\.).*")
# Python files that may reach the binary library directly.
LIBRARY_USERS = {
    "_library.py",
    "allocated.py",
    "allocation.py",
    "analysis/agreement.py",
    "analysis/combinations.py",
    "analysis/distances.py",
    "analysis/subspaces.py",
    "analysis/updates.py",
    "checkpoint.py",
    "commands/inspect.py",
    "commands/plan.py",
    "config.py",
    "directions.py",
    "doctor.py",
    "file_base.py",
    "file_config.py",
    "file_export.py",
    "file_names.py",
    "file_slots.py",
    "files.py",
    "folder_changes.py",
    "integrations/peft/allocated.py",
    "ops.py",
    "patterns.py",
    "plots/budgets.py",
    "rank_budget.py",
    "sharding.py",
    "spectral.py",
    "verification.py",
}


def room_of(name: str) -> str:
    return max((room for room in ROOMS if name.startswith(f"{room}/")), key=len)


def cpp_breach(name: str, quote: str, target: str) -> str | None:
    """What is wrong with an include of `target`, quoted as it stands ("<" or '"'), in `name`."""
    room = room_of(name)
    own, libraries = ROOMS[room]
    if quote == "<":
        if PRIVATE.fullmatch(target):
            return "a private header is included by its path, in quotes"
        if re.match(libraries, target):
            return f"{room} may not include it"
        if TORCH_FREE.fullmatch(name) and re.match(r"ATen|c10", target):
            return "this file is free of torch"
        return None
    if room == "csrc/include":
        return "a public header includes public headers alone, as <rankwise/...>"
    path = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
    if room_of_file(path) == room or re.fullmatch(rf"csrc/({own})", path):
        return None
    return f"{room} may not include it"


def room_of_file(path: str) -> str | None:
    return room_of(path) if any(path.startswith(f"{room}/") for room in ROOMS) else None


def cpp_breaches(root: Path) -> list[str]:
    breaches = []
    for path in sorted((root / "csrc").rglob("*.[hc]*")):
        name = path.relative_to(root).as_posix()
        if room_of_file(name) is None or not path.is_file():
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if match := re.match(r"\s*#\s*include\s+([<\"])([^>\"]+)", line):
                if wrong := cpp_breach(name, match[1], match[2]):
                    breaches.append(f"{name}:{number}: {match[2]}: {wrong}")
    return breaches


def python_breaches(root: Path) -> list[str]:
    breaches = []
    package = root / "python" / "rankwise"
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        for number, line in enumerate(path.read_text().splitlines(), 1):
            direct = re.search(r"torch\.ops|rankwise\._C|from \.+_library import library", line)
            if direct and name not in LIBRARY_USERS:
                breaches.append(
                    f"{name}:{number}: only {', '.join(sorted(LIBRARY_USERS))} reach it"
                )
    return breaches


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    found = cpp_breaches(where) + python_breaches(where)
    print("\n".join(found) if found else "include rules: ok")
    sys.exit(bool(found))
