# What a measurement declares, and the options that all of them share.
from __future__ import annotations

import random
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from . import ROOT

OUTPUT = ROOT / "build" / "bench"
T = TypeVar("T")


def number(default: int, help: str, least: int = 1) -> dict[str, object]:
    """Keywords of add_argument for a whole number of at least `least`."""

    def parsed(text: str) -> int:
        if not (text.isdecimal() and int(text) >= least):
            raise ArgumentTypeError(f"a whole number of at least {least} was wanted, got {text}")
        return int(text)

    help = f"{help} (default %(default)s)"
    return {"type": parsed, "default": default, "metavar": "N", "help": help}


def names(choices: Sequence[str], default: Sequence[str], help: str) -> dict[str, object]:
    """Keywords of add_argument for one or more of `choices`."""
    help = f"{help}: {', '.join(choices)} (default {' '.join(default)})"
    return {"nargs": "+", "choices": choices, "default": default, "metavar": "NAME", "help": help}


def device_option(default: str = "cpu") -> dict[str, object]:
    """Keywords of add_argument for where a measurement runs."""
    help = "of all tensors (default %(default)s)"
    return {"choices": ("cpu", "cuda"), "default": default, "help": help}


def within(seconds: float, cases: Iterable[T], unfinished: list[str]) -> Iterator[T]:
    """The cases that are asked for in the `seconds` from now on; the others' names are kept.

    Where a measurement's results have an "unfinished", the program names what is in it at its end.
    """
    end = time.monotonic() + seconds

    def begun() -> Iterator[T]:
        for case in cases:
            if time.monotonic() > end:
                unfinished.append(str(case))
            else:
                yield case

    return begun()


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


@contextmanager
def kept(failed: dict[str, str], what: object) -> Iterator[None]:
    """Keeps why `what` failed, so that the rest is measured.

    Where a measurement's results have a "failed" that is not empty, the program fails at its end.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001
        failed[str(what)] = reason(error)
        print(f"{what} failed: {failed[str(what)]}", flush=True)


@dataclass(frozen=True)
class Measurement:
    """run(options) measures, prints tables, draws into options.output and returns results for JSON.

    `quick` has the defaults that --quick puts in the place of others. `threads` are PyTorch's; None
    where they are not to be chosen. `arguments` are the measurement's own: {flag: keywords of
    add_argument}.
    """

    run: Callable[[Namespace], object]
    repeats: int
    quick: Mapping[str, object]
    threads: int | None = 2
    arguments: Mapping[str, Mapping[str, object]] = field(default_factory=dict)

    def __call__(self, options: Namespace) -> object:
        """run(options), with the turns in the same random order every time."""
        random.seed(0)
        if self.threads is not None:
            torch.set_num_threads(options.threads)
        return self.run(options)

    def options(self, name: str, description: str, given: Sequence[str]) -> Namespace:
        """Of the command line `given`; --help and errors end the program."""
        parser = self._parser(name, description)
        options = parser.parse_args(given)
        if options.quick:
            parser.set_defaults(**self.quick)
            options = parser.parse_args(given)
        return options

    def _parser(self, name: str, description: str) -> ArgumentParser:
        parser = ArgumentParser(
            prog=f"python -m bench {name}",
            description=description,
            formatter_class=RawDescriptionHelpFormatter,
        )
        add = parser.add_argument
        for flag, keywords in self.arguments.items():
            add(flag, **keywords)
        add("--repeats", **number(self.repeats, "turns of each contender", least=2))  # quartiles
        if self.threads is not None:
            add("--threads", **number(self.threads, "of PyTorch"))
        quick = ", ".join(f"{name} {value}" for name, value in self.quick.items())
        add("--quick", action="store_true", help=f"other defaults: {quick}")
        output = "folder of results and pictures (default build/bench)"
        add("--output", type=Path, default=OUTPUT, metavar="DIR", help=output)
        add("--json", type=Path, metavar="FILE", help=f"of the results (default DIR/{name}.json)")
        return parser
