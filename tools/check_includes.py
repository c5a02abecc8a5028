"""Checks who includes and imports whom (README, Architecture): prints breaches, exits 1 if any."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# folder -> (what an include may match, what it may not)
CPP_RULES = {
    "csrc/kernels": r"^<(ATen|torch|c10|pybind11|Python)",
    "csrc/io": r"^(<(pybind11|Python|torch/)|\"\.\./(ops|kernels|bindings|nn))",
    "csrc/ops": r"^(<(pybind11|Python)|\"\.\./(io|bindings|nn|allocation))",
    "csrc/nn": r"^(<(pybind11|Python)|\"\.\./)",
    "csrc/allocation": r"^(<(pybind11|Python)|\"\.\./(?!ops/importance\.h))",
    "csrc/bindings": r"^\"\.\./(ops|kernels)",
    "csrc/include": r"^(<(pybind11|Python)|\")",
}
TORCH_FREE = re.compile(r"csrc/io/(?!adapter_(file|fold|tensors)\.).*")
# Python files that may reach the binary library directly.
LIBRARY_USERS = {
    "_library.py",
    "allocation.py",
    "config.py",
    "doctor.py",
    "file_config.py",
    "files.py",
    "ops.py",
}


def cpp_breaches() -> list[str]:
    breaches = []
    for folder, forbidden in CPP_RULES.items():
        for path in sorted((ROOT / folder).rglob("*.[hc]*")):
            name = path.relative_to(ROOT).as_posix()
            for number, line in enumerate(path.read_text().splitlines(), 1):
                match = re.match(r"\s*#\s*include\s+([<\"].*)", line)
                if match and re.match(forbidden, match[1]):
                    breaches.append(f"{name}:{number}: {folder} may not include {match[1]}")
                if match and TORCH_FREE.fullmatch(name) and re.match(r"<(ATen|c10)", match[1]):
                    breaches.append(f"{name}:{number}: this file is torch-free, not {match[1]}")
    return breaches


def python_breaches() -> list[str]:
    breaches = []
    for path in sorted((ROOT / "python" / "rankwise").rglob("*.py")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            direct = re.search(r"torch\.ops|rankwise\._C|from \._library import library", line)
            if direct and path.name not in LIBRARY_USERS:
                breaches.append(f"{path.name}:{number}: only {sorted(LIBRARY_USERS)} reach it")
    return breaches


if __name__ == "__main__":
    found = cpp_breaches() + python_breaches()
    print("\n".join(found) if found else "include rules: ok")
    sys.exit(bool(found))
