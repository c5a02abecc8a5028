"""tools/check_includes.py passes on the sources as they are and sees a breach of every rule."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

BREACHES = {
    "a CPU file takes a CUDA header": ("csrc/ops/cpu/blocks.cpp", '#include "../cuda/launch.h"'),
    "a CUDA file takes a CPU header": ("csrc/ops/cuda/adapter.cpp", '#include "../cpu/blocks.h"'),
    "an operator takes a CPU header": ("csrc/ops/checks.cpp", '#include "cpu/panels.h"'),
    "an operator takes a CUDA header": ("csrc/ops/checks.cpp", '#include "cuda/launch.h"'),
    "another room takes a CPU header": (
        "csrc/allocation/averages.cpp",
        '#include "../ops/cpu/importance_loops.h"',
    ),
    "another room takes a CUDA header": ("csrc/nn/adapted.cpp", '#include "../ops/cuda/path.h"'),
    "another room takes an operator's": ("csrc/bindings/files.cpp", '#include "../ops/checks.h"'),
    "a CPU file takes another room's": ("csrc/ops/cpu/blocks.cpp", '#include "../../io/safetensors.h"'),
    "a public header takes a private one": ("csrc/include/rankwise/ops.h", '#include "checks.h"'),
    "a public header names a private one": ("csrc/include/rankwise/ops.h", "#include <ops/checks.h>"),
    "device code takes torch": ("csrc/kernels/philox.h", "#include <ATen/ATen.h>"),
    "device code takes an operator's": ("csrc/kernels/philox.h", '#include "../ops/checks.h"'),
    "an operator takes Python": ("csrc/ops/cpu/blocks.cpp", "#include <pybind11/pybind11.h>"),
    "the file layer takes torch": ("csrc/io/safetensors.cpp", "#include <ATen/ATen.h>"),
    "a Python file takes the library": (
        "python/rankwise/model.py",
        "from ._library import library",
    ),
}  # fmt: skip


def check(root: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "check_includes.py"), str(root)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_sources_keep_to_the_rules():
    result = check(ROOT)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("breach", BREACHES)
def test_a_planted_breach_is_seen(breach, tmp_path):
    name, line = BREACHES[breach]
    planted = tmp_path / name
    planted.parent.mkdir(parents=True)
    shutil.copy(ROOT / name, planted)
    planted.write_text(f"{line}\n{planted.read_text()}")
    result = check(tmp_path)
    assert result.returncode == 1
    assert result.stdout.startswith(f"{Path(name).name if 'python' in name else name}:1: ")
