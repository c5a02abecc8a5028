"""docs/reliability.md names tests that exist, and says of every fault what is seen."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text()
ROWS = re.findall(r"^\| (.+) \| (.+) \| (`.+`) \|$", PAGE, re.MULTILINE)
NAMED = [name for row in ROWS for name in re.findall(r"`([^`]+)`", row[2])]


def exists(named: str) -> bool:
    path, _, name = named.partition("::")
    source = ROOT / "tests" / path
    if not source.is_file():
        return False
    if source.suffix == ".py":
        wanted = rf"^def {re.escape(name)}\("
    else:
        suite, _, test = name.partition(".")
        wanted = rf"^TEST(_F|_P)?\({re.escape(suite)},\s*{re.escape(test)}\)"
    return re.search(wanted, source.read_text(), re.MULTILINE) is not None


def test_every_row_was_read():
    lines = [line for line in PAGE.splitlines() if line.startswith("|")]
    assert len(ROWS) == len(lines) - 2 > 30  # but the head and the line under it


@pytest.mark.parametrize("named", NAMED)
def test_the_tests_are_there(named):
    assert exists(named)


def test_one_that_is_not_there_is_noticed():
    assert not exists("python/test_reliability_page.py::test_every_row")
    assert not exists("cpp/io/adapter_file_test.cpp::AdapterFile.KillAtEveryCall")
    assert not exists("python/test_nothing.py::test_every_row_was_read")
