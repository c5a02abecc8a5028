# A training that goes on from a checkpoint is the uninterrupted one, bit for bit.
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_trainings import METHODS, OPTIMIZERS, STEPS, Run, same

STOPS = (2, 6, 11)
TRAININGS = list(itertools.product(METHODS, OPTIMIZERS))

FRESH = """
import sys, torch
from checkpoint_trainings import STEPS, Run
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    for stop in {stops}:
        run = Run(*folder.split("/")[-2:], seed=99)
        step = run.load(f"{folder}/{stop}")
        losses = run.train(range(step, STEPS))
        torch.save({"losses": losses, "state": run.state()}, f"{folder}/{stop}.pt")
"""


def uninterrupted(method: str, optimizer: str, folder: Path) -> tuple[Run, list[float], list]:
    """With a checkpoint at each stop."""
    run, losses = Run(method, optimizer), []
    for step in range(STEPS):
        if step in STOPS:
            run.save(folder / str(step), step)
        losses += run.train([step])
    assert len(set(losses)) == STEPS
    if run.allocator is not None:  # at stops between them
        assert len({tuple(entry.ranks) for entry in run.allocator.history}) > 2
    return run, losses, run.state()


@pytest.mark.parametrize("method, optimizer", TRAININGS)
def test_resume_at_each_stop(method, optimizer, tmp_path):
    _, losses, wanted = uninterrupted(method, optimizer, tmp_path)
    for stop in STOPS:
        again = Run(method, optimizer, seed=99)
        assert again.load(tmp_path / str(stop)) == stop
        assert again.train(range(stop, STEPS)) == losses[stop:]
        assert same(again.state(), wanted)


@pytest.mark.parametrize("method", METHODS)
def test_going_back_in_the_same_training(method, tmp_path):
    run, losses, wanted = uninterrupted(method, "adamw", tmp_path)
    for stop in reversed(STOPS):
        assert run.load(tmp_path / str(stop)) == stop
        assert run.train(range(stop, STEPS)) == losses[stop:]
        assert same(run.state(), wanted)


def test_resume_in_a_fresh_process(tmp_path):
    folders = [tmp_path / m / o for m, o in TRAININGS]
    ends = [uninterrupted(*pair, f) for pair, f in zip(TRAININGS, folders, strict=True)]
    script = FRESH.replace("{stops}", str(STOPS))
    subprocess.run([sys.executable, "-c", script, *folders], check=True, cwd=Path(__file__).parent)
    for folder, (_, losses, wanted) in zip(folders, ends, strict=True):
        for stop in STOPS:
            got = torch.load(folder / f"{stop}.pt", weights_only=False)
            assert got["losses"] == losses[stop:]
            assert same(got["state"], wanted)
