"""The import check: built-for, found, and the command that rebuilds, in one sentence."""

import re
import subprocess
import sys

import pytest
import torch

from rankwise import _library


def test_the_installed_package_asks_for_the_torch_it_was_built_for():
    built = _library._built_for_torch()
    assert torch.__version__.startswith(built + ".")


@pytest.mark.parametrize("found", ["2.12.0", "2.10.1+cpu", "3.11.0"])
def test_another_torch_minor_is_refused_before_anything_is_loaded(found):
    with pytest.raises(ImportError) as error:
        _library.load(found, "2.11")
    assert re.fullmatch(
        rf"rankwise was built for torch 2.11, but torch {re.escape(found)} is installed; "
        r"rebuild it with: pip install --no-build-isolation --force-reinstall --no-deps \.",
        str(error.value),
    )


def test_importing_under_another_torch_says_so():
    code = "import torch; torch.__version__ = '2.99.0'; import rankwise"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0
    built = f"rankwise was built for torch {_library._built_for_torch()}"
    assert f"{built}, but torch 2.99.0 is installed" in result.stderr


def test_another_patch_release_will_do():
    assert _library.load("2.11.3+cu130", "2.11") is _library.library


def test_importing_without_pythons_lock_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
    with pytest.raises(ImportError, match="start Python without it"):
        _library.load(torch.__version__, torch.__version__)


def test_importing_with_pythons_lock_is_as_before_it_could_be_off(monkeypatch):
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: True, raising=False)
    assert _library.load(torch.__version__, torch.__version__) is _library.library


def test_importing_starts_no_cuda():
    code = "import rankwise, torch; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_starts_no_threads():
    code = """
import os, torch
before = os.listdir("/proc/self/task")
import rankwise
assert os.listdir("/proc/self/task") == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)
