"""How far adapters lie apart, and whether two compute the same function."""

from __future__ import annotations

import os
from dataclasses import dataclass

from .._library import library
from ..adapted import Adapted
from ..config import _is_real, _require
from .updates import Update, for_library, read, result_of

_core = library.analysis


@dataclass(frozen=True)
class Distance:
    """How far two updates lie apart.

    Args:
        absolute: ``||dW1 - dW2||_F``.
        relative: of the larger of both norms, 0 to 2; 0 where both are 0.
    """

    absolute: float
    relative: float


@dataclass(frozen=True)
class FunctionComparison:
    """Whether two adapters compute the same function: true where nothing differs.

    Args:
        differing: {module: distance} of what is further apart than the tolerance.
    """

    differing: dict[str, Distance]

    def __bool__(self) -> bool:
        return not self.differing

    def __str__(self) -> str:
        if not self.differing:
            return "the same function"
        lines = [f"  {m}: relative distance {d.relative:.3g}" for m, d in self.differing.items()]
        return "\n".join(["another function:", *lines])


def distance(first: Update | Adapted, second: Update | Adapted) -> Distance:
    """``||dW1 - dW2||_F``, absolute and relative, through the factors; of any two ranks."""
    pair = for_library("distance", "first", first), for_library("distance", "second", second)
    return result_of(Distance, _core.distance(*pair))


def distances(first: str | os.PathLike, second: str | os.PathLike) -> dict[str, Distance]:
    """{module: distance} of all modules of two PEFT folders, of LoRA or AdaLoRA.

    A folder that lacks a module adds nothing there. Weights of modules trained whole are there as
    ``module.parameter``. Infinite: shapes differ, or such a weight is in one folder alone.
    """
    files = read("distances", "first", first), read("distances", "second", second)
    return {d.module: result_of(Distance, d.distance) for d in _core.distances(*files)}


def same_function(
    first: str | os.PathLike, second: str | os.PathLike, tolerance: float = 1e-6
) -> FunctionComparison:
    """Whether two PEFT folders compute the same function over every base.

    Whatever their methods, ranks, scales and bases of the factors.

    Args:
        first, second: folders of LoRA or AdaLoRA.
        tolerance: the largest relative distance of a module that counts as the same.

    Returns:
        True in a condition where all modules are the same; it names those that differ.
    """
    _require(
        _is_real(tolerance) and tolerance >= 0, "same_function", "tolerance", ">= 0", tolerance
    )
    found = distances(first, second)
    return FunctionComparison({m: d for m, d in found.items() if not d.relative <= tolerance})
