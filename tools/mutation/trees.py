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
BUILD_LIMIT = 3600.0  # seconds
TEST_LIMIT = 600.0  # of tests whose usual time is not known
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

        Raises:
            RuntimeError: the test that killed it does not pass without it.
        """
        file = self.sources / mutant.file
        original = file.read_bytes()
        file.write_bytes(mutant.applied(original))
        try:
            for step in self.build:
                if self._run(step, BUILD_LIMIT)[0] != "passed":
                    return "invalid", ""
            killer, said = self._first_failure(tests)
        finally:
            file.write_bytes(original)
        if killer is None:
            return "survived", ""
        if killer not in self._usual:
            for step in self.build:
                self._check(step)
            started = time.monotonic()
            self._check(killer)
            self._usual[killer] = time.monotonic() - started
        return "killed", said

    def _first_failure(self, tests: Sequence[str]) -> tuple[Command | None, str]:
        """The command that does not pass, if one does not, and what it said."""
        for command in self.commands(tests):
            if command[0] != "pytest":
                self._check(("cmake", "--build", self.programs, "--target", command[0].name))
            usual, started = self._usual.get(command), time.monotonic()
            outcome, output = self._run(command, TEST_LIMIT if usual is None else 20 + 3 * usual)
            if outcome != "passed":
                failures = re.findall(r"^(?:FAILED|ERROR|\[  FAILED  \]) .+", output, re.M)
                return command, (failures or [f"{outcome}: {command[-1]}"])[0]
            self._usual.setdefault(command, time.monotonic() - started)
        return None, ""

    def commands(self, tests: Sequence[str]) -> list[Command]:
        """The C++ programs, the first Python file, and the others in one process."""
        python = [source_of(test) for test in tests if test.endswith(".py")]
        programs = [test.replace("/", "_") for test in tests if not test.endswith(".py")]
        return [
            *((self.programs / program, "--gtest_fail_fast") for program in programs),
            *(("pytest", "-x", *files) for files in (python[:1], python[1:]) if files),
        ]

    def _run(self, command: Command, limit: float) -> Outcome:
        if command[0] == "pytest":
            return run_pytest(command[1:], limit, self.checkout, self.environment)
        return run(command, limit, cwd=self.checkout, env={**os.environ, **self.environment})

    def _check(self, command: Command) -> None:
        outcome, output = self._run(command, BUILD_LIMIT)
        if outcome != "passed":
            raise RuntimeError(f"without a mutant {outcome}: {command}\n{output[-3000:]}")


def source_of(test: str) -> str:
    """The file of a test, from the checkout."""
    return f"tests/python/{test}" if test.endswith(".py") else f"tests/cpp/{test}.cpp"


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


def cpp_tree(checkout: Path, folder: Path) -> Tree:
    """The library, for the host alone and not optimised, the binding, and the C++ tests.

    A test's program is built where it is first needed.
    """
    sources = ("CMakeLists.txt", "pyproject.toml", "csrc", "tests/cpp", "tests/fuzz")
    copy_sources(checkout, folder, (*sources, "python/rankwise"))
    package, library, programs = (folder / name for name in ("python", "library", "programs"))
    torch = importlib.util.find_spec("torch").submodule_search_locations[0]
    settings = (
        "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O0",
        f"-DLibTorch_ROOT={torch}", f"-DRANKWISE_PYTHON={BIN / 'python'}",
    )  # fmt: skip
    build = [("cmake", "--build", library, "-j", "2"), ("cmake", "--install", library)]
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    environment = {"PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1", "PATH": path}
    tree = Tree(folder, checkout, build, programs, environment)
    for command in (
        ("cmake", "-S", folder, "-B", library, *settings, "-DRANKWISE_WITH_CUDA=off",
         "-DRANKWISE_WITH_PYTHON=ON", f"-DPython_EXECUTABLE={BIN / 'python'}",
         f"-DCMAKE_INSTALL_PREFIX={package / 'rankwise'}"),
        *build,
        ("cmake", "-S", folder / "tests" / "cpp", "-B", programs, *settings,
         f"-DCMAKE_PREFIX_PATH={package / 'rankwise'}", "-Dcuda_headers=OFF",
         "-DCMAKE_LINK_DEPENDS_NO_SHARED=ON"),
    ):  # fmt: skip
        tree._check(command)
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
