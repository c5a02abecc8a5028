"""make soak: a long training with pruning, saving and loading keeps its memory flat.

100,000 steps of each method; every 100th is saved and loaded, and after every 200th, when ranks are
final, the adapter, its allocator and the optimizer are made anew. Resident memory and the objects
that Python has allocated are noted at each save; the mean of the last tenth may lie 1 % above that
of the second tenth.
"""

from __future__ import annotations

import gc
import os
import sys
from argparse import ArgumentParser
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from pruned_training import METHODS, PrunedTraining
from torch import Tensor
from tqdm import trange

EVERY = 100  # steps between two checkpoints
MOST_GROWTH = 0.01


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def soak(method: str, steps: int) -> dict[str, Tensor]:
    """MiB in memory, and Python's objects, after every save."""
    training = PrunedTraining(method)
    samples = torch.zeros(2, steps // EVERY, dtype=torch.double)  # not of Python's memory
    with TemporaryDirectory() as folder:
        for i in trange(steps // EVERY, desc=method, mininterval=5):
            for number in range(i * EVERY, (i + 1) * EVERY):
                training.step(number)
            training.save(folder, number + 1)
            assert training.load(folder) == number + 1
            gc.collect()
            samples[:, i] = torch.tensor([resident() / 2**20, sys.getallocatedblocks()])
    return {"resident memory in MiB": samples[0], "Python's objects": samples[1]}


def growth(samples: Tensor) -> tuple[float, float, float]:
    """The means of the second and the last tenth, and by which part the last is above."""
    tenth = len(samples) // 10
    first, last = samples[tenth : 2 * tenth].mean().item(), samples[-tenth:].mean().item()
    return first, last, last / first - 1


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000, help="of each method")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options = parser.parse_args()
    if options.steps < 10 * EVERY:
        parser.error(f"--steps must be at least {10 * EVERY}, got {options.steps}")
    torch.set_num_threads(1)
    grown = False
    for method in options.methods:
        for kind, samples in soak(method, options.steps).items():
            first, last, part = growth(samples)
            grown |= part > MOST_GROWTH
            print(
                f"{method}, {len(samples)} checkpoints: {kind} {first:,.1f} in the second tenth, "
                f"{last:,.1f} in the last: {part:+.3%}",
                flush=True,
            )
    return grown


if __name__ == "__main__":
    sys.exit(main())
