"""The device tests share the helpers of the other suites.

An error on the device ends the process's CUDA context: all that runs there later fails as well.
So the process ends with the test that met one. Under pytest-xdist a fresh worker takes the other
tests, and the test is reported once more, as the one in which a worker crashed; `--dist load` alone
does not start it again (the file and scope schedulers do).
"""

import os
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / name) for name in ("ops", "allocation")]

LOST = pytest.StashKey[bool]()


def pytest_runtest_makereport(item, call):
    if call.excinfo is not None and call.excinfo.errisinstance(torch.AcceleratorError):
        item.config.stash[LOST] = True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    result = yield
    if item.config.stash.get(LOST, False):
        if hasattr(item.config, "workerinput"):
            os._exit(1)  # the reports have been sent
        pytest.exit(f"no CUDA context after {item.nodeid}", returncode=1)
    return result


@pytest.fixture(autouse=True)
def meets_its_own_errors(request):
    """Errors show where the host next waits for the device: here, not in another test."""
    yield
    if not request.config.stash.get(LOST, False):
        torch.cuda.synchronize()
