# A pytest plugin (-p file_limits): --file-limit SECONDS is what each test file may take.
"""The time runs from the file's first test, in whichever worker of pytest-xdist it begins.

A test that runs past it ends its process, also where it waits for a device that does not answer:
under pytest-xdist it is reported as the one in which its worker crashed, and a fresh worker takes
the other tests. Tests of the file that have not begun by then fail.
"""

import faulthandler
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest

FOLDER = "RANKWISE_FILE_LIMITS"  # where a file is left for each test file, for workers to see


def pytest_addoption(parser):
    parser.addoption("--file-limit", type=float, metavar="SECONDS", help="what a file may take")


def pytest_configure(config):
    if FOLDER not in os.environ:  # not a worker
        os.environ[FOLDER] = config.file_limits = tempfile.mkdtemp()


def pytest_unconfigure(config):
    if folder := getattr(config, "file_limits", None):
        shutil.rmtree(folder)
        del os.environ[FOLDER]


def seconds_left(item) -> float:
    """The age of what the first test of the file left behind is what was taken."""
    mark = Path(os.environ[FOLDER]) / item.path.as_posix().replace("/", "_")
    if not mark.exists():
        mark.touch()
    return item.config.getoption("--file-limit") - (time.time() - mark.stat().st_mtime)


def limited(item) -> bool:
    return item.config.getoption("--file-limit") is not None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    left = seconds_left(item) if limited(item) else 0
    if left > 0:
        faulthandler.dump_traceback_later(left, exit=True, file=sys.__stderr__)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if limited(item) and seconds_left(item) <= 0:
        limit = item.config.getoption("--file-limit")
        pytest.fail(f"{item.path.name} has had its {limit:g} s", pytrace=False)
