# What host.py runs under Valgrind: each contender's calls, counted by themselves.
"""Usage: python -m bench.host_calls MARKERS TOKENS WIDTH RANK CALLS

MARKERS is a library of requests to Valgrind.
"""

from __future__ import annotations

import ctypes
import sys

import torch

from .contenders import CONTENDERS, Case, Tensors

NAMES = ("frozen", "PEFT", "composition", "rankwise")


def main(markers: str, tokens: str, width: str, rank: str, calls: str) -> None:
    valgrind = ctypes.CDLL(markers)
    torch.set_num_threads(1)
    case = Case(int(tokens), int(width), int(width), int(rank))
    t = Tensors.draw(case)
    for name in NAMES:
        layer = CONTENDERS[name](case, t)

        def both(layer=layer) -> None:
            torch.autograd.grad(layer.forward(), layer.inputs, t.dy)

        for _ in range(5):
            both()
        valgrind.start()
        both()
        valgrind.zero()
        for _ in range(int(calls)):
            both()
        valgrind.dump()
        valgrind.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
