"""tools/check_includes.py passes on the sources as they are and sees a breach of every rule."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

BREACHES = [
    ("csrc/ops/cpu/blocks.cpp", '#include "../cuda/launch.h"'),
    ("csrc/ops/cpu/blocks.cpp", '#include "../../io/safetensors.h"'),
    ("csrc/ops/cpu/blocks.cpp", "#include <pybind11/pybind11.h>"),
    ("csrc/ops/cuda/adapter.cpp", '#include "../cpu/blocks.h"'),
    ("csrc/ops/cuda/adapter.cpp", '#include "../../nn/folder_config.h"'),
    ("csrc/ops/checks.cpp", '#include "cpu/panels.h"'),
    ("csrc/ops/checks.cpp", '#include "cuda/launch.h"'),
    ("csrc/allocation/averages.cpp", '#include "../ops/cpu/importance_loops.h"'),
    ("csrc/analysis/factors.cpp", '#include "../ops/checks.h"'),
    ("csrc/analysis/factors.cpp", '#include "../allocation/averages.h"'),
    ("csrc/nn/adapted.cpp", '#include "../analysis/factors.h"'),
    ("csrc/nn/adapted.cpp", '#include "../ops/cuda/path.h"'),
    ("csrc/bindings/files.cpp", '#include "../ops/checks.h"'),
    ("csrc/include/rankwise/ops.h", '#include "checks.h"'),
    ("csrc/include/rankwise/ops.h", "#include <ops/checks.h>"),
    ("csrc/kernels/philox.h", "#include <ATen/ATen.h>"),
    ("csrc/kernels/philox.h", '#include "../ops/checks.h"'),
    ("csrc/io/safetensors.cpp", "#include <ATen/ATen.h>"),
    ("python/rankwise/model.py", "from ._library import library"),
    ("python/rankwise/commands/doctor.py", "from .._library import library"),
]


def check(root: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "check_includes.py"), str(root)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_sources_keep_to_the_rules():
    result = check(ROOT)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name, line", BREACHES, ids=lambda text: text)
def test_a_planted_breach_is_seen(name, line, tmp_path):
    planted = tmp_path / name
    planted.parent.mkdir(parents=True)
    shutil.copy(ROOT / name, planted)
    planted.write_text(f"{line}\n{planted.read_text()}")
    result = check(tmp_path)
    assert result.returncode == 1
    assert result.stdout.startswith(f"{name.removeprefix('python/rankwise/')}:1: ")
