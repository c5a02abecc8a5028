"""Builds a CMake project against the installed package, outside the source tree, and runs it."""

import os
import subprocess
from pathlib import Path

import rankwise as rw

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def build(source: Path, folder: Path) -> Path:
    """The folder, with the programs in it."""
    cmake_dir = Path(rw.__file__).parent / "share" / "cmake"
    configure = ["cmake", "-S", source, "-B", folder, "-G", "Ninja"]
    subprocess.run([*configure, f"-DCMAKE_PREFIX_PATH={cmake_dir}"], check=True)
    subprocess.run(["cmake", "--build", folder, "-j", "2"], check=True)
    return folder


def output_of(program: Path, *arguments: str | os.PathLike) -> str:
    """What a program prints; it must succeed and write nothing to stderr."""
    result = subprocess.run([program, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    return result.stdout
