"""The long proofs of tests/proofs, in short."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROOFS = Path(__file__).resolve().parents[2] / "proofs"
sys.path.append(str(PROOFS))

from killed_process import killed_at  # noqa: E402
from kills import killed_at_every_call  # noqa: E402
from saves import Kind  # noqa: E402
from soak import growth  # noqa: E402


def run(name: str, *options: str) -> str:
    command = [sys.executable, PROOFS / name, *options]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_soak_of_1000_steps():
    printed = run("soak.py", "--steps", "1000", "--methods", "adalora").splitlines()
    assert len(printed) == 2 and all("adalora, 10 checkpoints: " in line for line in printed)


def test_growth_is_that_of_the_last_tenth_over_the_second():
    samples = torch.full((20,), 7.0)
    samples[2:4], samples[18:] = 100, torch.tensor([101.0, 103.0])
    assert growth(samples) == pytest.approx((100, 102, 0.02))


def written_in_steps(path: Path) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY)
    os.write(descriptor, b"abcd")
    os.write(descriptor, b"efgh")


def test_a_kill_at_every_system_call(tmp_path):
    found, killed = [], True
    while killed:
        path = tmp_path / str(len(found))
        killed = killed_at(len(found) + 1, lambda path=path: written_in_steps(path))
        found.append(path.read_bytes() if path.exists() else None)
    # Before the file is there, in the middle of each write, and at the end.
    assert list(dict.fromkeys(found)) == [None, b"ab", b"abcdef", b"abcdefgh"]


def renamed(path: Path, text: str) -> None:
    path.mkdir(exist_ok=True)
    (path / "new").write_text(text)
    os.rename(path / "new", path / "file")


def read(path: Path) -> str | None:
    return (path / "file").read_text() if (path / "file").exists() else None


def test_saves_that_rename_have_no_mixture(tmp_path):
    kind = Kind(lambda path: renamed(path, "old"), lambda path: renamed(path, "newer"), read)
    found = killed_at_every_call("renames", kind, tmp_path)
    assert found.keys() == {"old", "new"} and found["old"] > 3


def test_a_save_in_place_is_found_out(tmp_path):
    def in_place(path: Path) -> None:
        path.mkdir(exist_ok=True)
        (path / "file").write_text("newer")

    kind = Kind(lambda path: renamed(path, "old"), in_place, read)
    with pytest.raises(AssertionError, match="neither the old state nor the new one"):
        killed_at_every_call("in place", kind, tmp_path)


def test_an_action_that_raises_is_no_kill():
    with pytest.raises(RuntimeError, match="the action ended with status"):
        killed_at(10**6, lambda: 1 / 0)
