"""Copies of the sources in which mutants are tried: of the Python package, and of the C++ library.

The checkout itself is never changed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .mutants import Mutant
from .processes import Outcome, run, run_pytest

BINARIES = ("lib", "include", "share", "_C*.so")  # of the package, built from C++
BUILD_LIMIT = 600.0  # seconds
BIN = Path(sys.executable).parent

Command = tuple[object, ...]


@dataclass
class Tree:
    """A copy of sources, the commands that build it, and how tests see what was built.

    Args:
        sources: the copy; a mutant's file is below it.
        checkout: the repository, whose tests run.
        build: commands to run after each change.
        programs: the folder of the C++ tests' executables.
        environment: of builds and tests.
    """

    sources: Path
    checkout: Path
    build: Sequence[Command] = ()
    programs: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)
    _usual: dict[Command, float] = field(default_factory=dict)

    def try_out(self, mutant: Mutant, tests: Sequence[str]) -> tuple[str, str]:
        """What became of a mutant, and what a test said to it.

        "killed", "survived", or "invalid": it does not compile.
        """
        commands = self.commands(tests)
        for command in commands:
            if command not in self._usual:
                self._usual[command] = self.usual_time(command)
        file = self.sources / mutant.file
        original = file.read_bytes()
        file.write_bytes(mutant.applied(original))
        try:
            for command in self.build:
                if self._run(command, BUILD_LIMIT)[0] != "passed":
                    return "invalid", ""
            for command in commands:
                outcome, output = self._run(command, 20 + 3 * self._usual[command])
                if outcome != "passed":
                    failures = re.findall(r"^(?:FAILED|ERROR|\[  FAILED  \]) .+", output, re.M)
                    return "killed", (failures or [f"{outcome}: {command[-1]}"])[0]
        finally:
            file.write_bytes(original)
        return "survived", ""

    def usual_time(self, command: Command) -> float:
        """Seconds that tests take without a mutant; RuntimeError where they do not pass."""
        for step in self.build:
            self._check(step, BUILD_LIMIT)
        started = time.monotonic()
        self._check(command, BUILD_LIMIT)
        return time.monotonic() - started

    def commands(self, tests: Sequence[str]) -> list[Command]:
        """The C++ programs, the first Python file, and the others in one process."""
        python = [f"tests/python/{test}" for test in tests if test.endswith(".py")]
        programs = [test.replace("/", "_") for test in tests if not test.endswith(".py")]
        return [
            *((str(self.programs / program), "--gtest_fail_fast") for program in programs),
            *(("pytest", "-x", *files) for files in (python[:1], python[1:]) if files),
        ]

    def _run(self, command: Command, limit: float) -> Outcome:
        if command[0] == "pytest":
            return run_pytest(command[1:], limit, self.checkout, self.environment)
        return run(command, limit, cwd=self.checkout, env={**os.environ, **self.environment})

    def _check(self, command: Command, limit: float) -> None:
        outcome, output = self._run(command, limit)
        if outcome != "passed":
            raise RuntimeError(f"without a mutant {outcome}: {command}\n{output[-3000:]}")


def python_tree(checkout: Path, folder: Path) -> Tree:
    """The package's Python files, beside the binaries of the installed package."""
    copy_sources(checkout, folder, ("python/rankwise",))
    installed = Path(importlib.util.find_spec("rankwise").submodule_search_locations[0])
    for pattern in BINARIES:
        for binary in installed.glob(pattern):
            link = folder / "python" / "rankwise" / binary.name
            link.unlink(missing_ok=True)
            link.symlink_to(binary.resolve())
    # A bytecode file is taken for that of a source of the same length and second.
    environment = {"PYTHONPATH": str(folder / "python"), "PYTHONDONTWRITEBYTECODE": "1"}
    return Tree(folder, checkout, environment=environment)


def cpp_tree(checkout: Path, folder: Path, tests: Sequence[str]) -> Tree:
    """The library, for the host alone and not optimised, the binding and these tests' programs."""
    sources = ("CMakeLists.txt", "pyproject.toml", "csrc", "tests/cpp", "tests/fuzz")
    copy_sources(checkout, folder, (*sources, "python/rankwise"))
    package, library, programs = (folder / name for name in ("python", "library", "programs"))
    torch = importlib.util.find_spec("torch").submodule_search_locations[0]
    settings = (
        "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O0",
        f"-DLibTorch_ROOT={torch}", f"-DRANKWISE_PYTHON={BIN / 'python'}",
    )  # fmt: skip
    tree = Tree(
        folder, checkout, programs=programs,
        environment={"PYTHONPATH": str(package), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},
        build=[
            ("cmake", "--build", library, "--", "-j", "2"),
            ("cmake", "--install", library),
        ],
    )  # fmt: skip
    tree._check(
        ("cmake", "-S", folder, "-B", library, *settings, "-DRANKWISE_WITH_CUDA=off",
         "-DRANKWISE_WITH_PYTHON=ON", f"-DPython_EXECUTABLE={BIN / 'python'}",
         f"-DCMAKE_INSTALL_PREFIX={package / 'rankwise'}"), BUILD_LIMIT,
    )  # fmt: skip
    targets = [test.replace("/", "_") for test in tests if not test.endswith(".py")]
    for command in (
        *tree.build,
        ("cmake", "-S", folder / "tests" / "cpp", "-B", programs, *settings,
         f"-DCMAKE_PREFIX_PATH={package / 'rankwise'}", "-Dcuda_headers=OFF"),
        ("cmake", "--build", programs, "-j", "2", "--target", *targets),
    ):  # fmt: skip
        tree._check(command, limit=3600)
    return tree


def copy_sources(checkout: Path, folder: Path, paths: Sequence[str]) -> None:
    """Copies what git would commit, where it differs: builds go by the time of a file."""
    listing = ("git", "ls-files", "-co", "--exclude-standard", *paths)
    listed = subprocess.run(listing, cwd=checkout, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        source, copy = checkout / name, folder / name
        if copy.exists() and copy.read_bytes() == source.read_bytes():
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
