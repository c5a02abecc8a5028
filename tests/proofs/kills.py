"""make kills: processes killed while they save leave the old state or the new one, whole.

First saves of every kind are killed at every one of their system calls. Then a training that saves
at each step is killed at random times, and goes on from what is there: no save that it reported may
be lost, and every state must be, to the bit, that of a training that nobody kills.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from argparse import ArgumentParser
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from killed_process import forked, killed_at
from pruned_training import METHODS, PrunedTraining
from saves import Kind, kinds
from tqdm import tqdm, trange

sys.path.append(str(Path(__file__).resolve().parents[1] / "python" / "checkpoint"))

from checkpoint_trainings import same  # noqa: E402

LONGEST = 0.2  # seconds until a kill


def killed_at_every_call(name: str, kind: Kind, folder: Path, every: int = 1) -> Counter:
    """How often the old and the new state was found.

    Raises:
        AssertionError: there was neither, or a save afterwards left other files than usual.
    """
    kind.old(folder / "old")
    kind.new(folder / "new")
    states = {"old": kind.read(folder / "old"), "new": kind.read(folder / "new")}
    files = sorted(os.listdir(folder / "new"))
    found, call, going = Counter(), 1, True
    with tqdm(desc=name, unit=" kills", mininterval=5) as shown:
        while going:
            target = folder / str(call)
            kind.old(target)
            going = killed_at(call, lambda target=target: kind.new(target))
            state = kind.read(target)
            names = [which for which, wanted in states.items() if same(state, wanted)]
            assert names, f"{name}, call {call}: neither the old state nor the new one: {state}"
            if going:
                found[names[0]] += 1
                shown.update()
            else:
                assert names == ["new"], f"{name}: what was not killed is not there"
            if state is None or not name.startswith("merge"):  # which wants no old folder
                kind.new(target)
            assert sorted(os.listdir(target)) == files, f"{name}, call {call}: files are left"
            call += every
    return found


def killed_at_random(method: str, kills: int, folder: Path) -> Counter:
    """How often the last save that was reported was found, and how often the one after it.

    Raises:
        AssertionError: a save was lost, or a state is not that of an undisturbed training.
    """
    reference, training, found = PrunedTraining(method), PrunedTraining(method), Counter()
    training.save(folder, 0)
    trained, wanted, times = 0, reference.state(), random.Random(7)

    def go_on(begin: int, end: int) -> None:
        for number in range(begin, sys.maxsize):
            training.step(number)
            training.save(folder, number + 1)
            os.write(end, b".")

    begin = training.load(folder)
    for kill in trange(kills, desc=f"{method}, at random", mininterval=5):
        receiver, sender = os.pipe()
        process = forked(lambda begin=begin, sender=sender: go_on(begin, sender))
        os.close(sender)
        time.sleep(times.uniform(0, LONGEST))
        os.kill(process, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(process, 0)[1]), f"{method}, kill {kill}: it had ended"
        with os.fdopen(receiver, "rb") as reports:
            reported = begin + len(reports.read())
        begin = training.load(folder)
        state = training.state()
        assert begin in (reported, reported + 1), f"kill {kill}: {begin}, reported was {reported}"
        found["reported" if begin == reported else "next"] += 1
        if begin > trained:
            torch.set_rng_state(wanted[-1])
            for number in range(trained, begin):
                reference.step(number)
            trained, wanted = begin, reference.state()
            torch.set_rng_state(state[-1])
        assert same(state, wanted), f"{method}, kill {kill}: another state of step {begin}"
    found["steps"] = begin
    return found


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="system calls between two kills")
    parser.add_argument("--random", type=int, default=250, help="kills of each method's training")
    options = parser.parse_args()
    torch.set_num_threads(1)
    points = 0
    with TemporaryDirectory() as top:
        for i, (name, kind) in enumerate(kinds(Path(top)).items()):
            folder = Path(top, str(i))
            folder.mkdir()
            found = killed_at_every_call(name, kind, folder, options.every)
            points += found.total()
            print(f"{name}: {found['old']} found old, {found['new']} new", flush=True)
        for method in METHODS:
            found = killed_at_random(method, options.random, Path(top, method))
            print(
                f"{method}: {options.random} kills at random times over {found['steps']} steps: "
                f"{found['reported']} found the save reported last, {found['next']} the next",
                flush=True,
            )
    print(f"{points} kill points, {2 * options.random} random kills: none lost, none mixed")


if __name__ == "__main__":
    main()
