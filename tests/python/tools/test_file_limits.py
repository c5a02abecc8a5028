"""tests/python/file_limits.py and the end of a process with its CUDA context, in runs of pytest."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
HANGS = """
import time
import pytest

@pytest.mark.parametrize("i", range(4))
def test_short(i): pass

def test_hangs(): time.sleep(60)

@pytest.mark.parametrize("i", range(4))
def test_later(i): pass
"""
OTHERS = """
import pytest

@pytest.mark.parametrize("i", range(20))
def test_other(i): pass
"""
LOSES_ITS_CONTEXT = """
import os, pathlib
import pytest
import torch

@pytest.mark.parametrize("i", range(12))
def test_device(i):
    marked = pathlib.Path(__file__).with_name(f"lost_{os.getpid()}")
    assert not marked.exists(), "this process has no context"
    if i in (2, 5):
        marked.touch()
        raise torch.AcceleratorError("an illegal memory access was encountered")
"""


def run(folder: Path, *options: str) -> tuple[str, dict[str, int]]:
    """What pytest printed, and its numbers of tests by result."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "-rA", str(folder), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50)
    counts = re.findall(r"(\d+) (passed|failed|error)", done.stdout.splitlines()[-1])
    return done.stdout + done.stderr, {what: int(number) for number, what in counts}


@pytest.fixture
def with_a_hang(tmp_path):
    (tmp_path / "test_hangs.py").write_text(HANGS)
    (tmp_path / "test_others.py").write_text(OTHERS)
    return tmp_path


def test_a_test_that_hangs_costs_its_file_alone(with_a_hang):
    options = ("-p", "file_limits", "--file-limit=3", "-n", "2", "--dist=load")
    printed, counts = run(with_a_hang, *options)
    assert counts["passed"] >= 24, printed
    assert re.search(r"FAILED \S*test_hangs.py::test_hangs", printed), printed
    assert not re.search(r"FAILED \S*test_others.py", printed), printed
    assert "crashed while running" in printed


def test_what_has_not_begun_by_then_fails(tmp_path):
    first = HANGS.index("def test_hangs")
    (tmp_path / "test_slow.py").write_text(f"import pytest, time\n{HANGS[first:]}")
    printed, counts = run(tmp_path, "-p", "file_limits", "--file-limit=0.5", "-n", "1")
    assert counts == {"failed": 1, "error": 4}, printed  # the slow one, and what follows
    assert printed.count("test_slow.py has had its 0.5 s") >= 4


def test_without_a_limit_nothing_ends(with_a_hang):
    (with_a_hang / "test_hangs.py").write_text(HANGS.replace("60", "0.1"))
    _, counts = run(with_a_hang, "-p", "file_limits")
    assert counts == {"passed": 29}


def test_a_process_ends_with_its_cuda_context(tmp_path):
    """Of two tests that lose it, the ten others run, in other processes."""
    (tmp_path / "test_device.py").write_text(LOSES_ITS_CONTEXT)
    conftest = (TESTS / "cuda" / "conftest.py").read_text()
    assert "torch.cuda.synchronize()" in conftest
    (tmp_path / "conftest.py").write_text(conftest.replace("torch.cuda.synchronize()", "pass"))
    printed, counts = run(tmp_path, "-n", "1", "--dist=load", "--max-worker-restart=9")
    assert counts["passed"] == 10, printed
    assert "AssertionError: this process" not in printed
    assert {int(n) for n in re.findall(r"FAILED \S*test_device\[(\d+)\]", printed)} == {2, 5}
