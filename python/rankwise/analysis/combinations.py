"""Other updates of given ones: truncated, combined."""

from __future__ import annotations

import os
from dataclasses import dataclass

from .._library import library
from ..adapted import Adapted
from ..config import _is_integer, _is_real, _require
from .updates import Update, check_integers, check_list, for_library, read, result_of

_core = library.analysis
METHODS = tuple(_core.Combination.__members__)
SIGNS = ("total", "frequency")


@dataclass(frozen=True, eq=False)
class Approximation:
    """An update and how far it is from the exact one.

    Args:
        update: ``lora_A = diag(sqrt S) V^T``, ``lora_B = U diag(sqrt S)``, scaling 1; float64.
        error: in Frobenius norm: that of the singular values dropped.
        relative_error: of the exact update's norm; 0 where that is 0.
    """

    update: Update
    error: float
    relative_error: float


def truncate(update: Update | Adapted, rank: int) -> Approximation:
    """The best update of this rank at most, and its exact error (Eckart and Young, 1936).

    Args:
        update: an Update, or an adapted layer.
        rank: at least 0.
    """
    _require(_is_integer(rank), "truncate", "rank", "an integer", rank)
    return _approximation(_core.truncate(for_library("truncate", "update", update), rank))


def combine(
    updates: list[Update | Adapted],
    weights: list[float],
    *,
    method: str = "linear",
    rank: int | None = None,
    density: float = 0.5,
    majority_sign: str = "total",
    seed: int = 0,
) -> Approximation:
    """One update of several, of any ranks and scales, AdaLoRA's included.

    By the names and definitions of PEFT's add_weighted_adapter, on updates: "linear" is
    ``sum w_i dW_i``, exact (PEFT's "svd" and "cat"; PEFT's "linear" adds factors, and so the
    products of one adapter's B with another's A). The others are defined on the elements of dW, as
    PEFT's "ties_svd" and so on: they form dense updates, one at a time, and take an SVD of
    ``[out, in]``.

    Args:
        updates: of weights of one shape; an Update or an adapted layer each.
        weights: one each, also negative; they count on updates, whatever their scalings.
        method: "linear"; "magnitude_prune", elements trimmed by magnitude, then linear; "ties"
            (arXiv 2306.01708), trimmed, a sign elected, means of those that have it; "dare_linear"
            (arXiv 2311.03099), elements dropped at random, others divided by the density, then
            linear; "dare_ties", dropped so, then a sign elected.
        rank: of the result at most; None for all directions, with "linear" alone.
        density: the part of elements that are kept, above 0, at most 1.
        majority_sign: "total", of the elements' sum, or "frequency", of their signs' sum.
        seed: of the elements dropped.
    """
    check_list("combine", "updates", updates)
    given = [for_library("combine", f"updates[{i}]", update) for i, update in enumerate(updates)]
    options = _options("combine", method, rank, density, majority_sign, seed)
    return _approximation(_core.combine(given, _weights("combine", weights), options))


def combine_folders(
    folders: list[str | os.PathLike],
    weights: list[float],
    directory: str | os.PathLike,
    *,
    method: str = "linear",
    rank: int | None = None,
    density: float = 0.5,
    majority_sign: str = "total",
    seed: int = 0,
) -> None:
    """Writes the combination of PEFT's folders, module by module, as a plain LoRA folder.

    One folder with weight 1 and a rank is a truncation. Folders that lack a module add nothing
    there. The result has the first folder's settings, one rank for all modules, scale 1, and the
    widest of the factors' dtypes, to which each is rounded once; distances() tells what was lost.

    Args:
        folders: of LoRA or AdaLoRA.
        directory: created if missing.
        weights, method, rank, density, majority_sign, seed: as combine.

    Raises:
        ValueError: also where folders differ in a module trained whole.
        FileError: a folder cannot be read or written.
    """
    function = "combine_folders"
    options = _options(function, method, rank, density, majority_sign, seed)
    check_list(function, "folders", folders)
    files = [read(function, f"folders[{i}]", path) for i, path in enumerate(folders)]
    combined = _core.combine_files(files, _weights(function, weights), options)
    library.write_adapter(directory, combined)


def _approximation(found) -> Approximation:
    return Approximation(result_of(Update, found.update), found.error, found.relative_error)


def _options(function: str, method, rank, density, majority_sign, seed):
    _require(method in METHODS, function, "method", f"one of {METHODS}", method)
    _require(majority_sign in SIGNS, function, "majority_sign", f"one of {SIGNS}", majority_sign)
    _require(_is_real(density), function, "density", "a number", density)
    check_integers(function, rank=rank, seed=seed)
    return _core.CombineOptions(
        getattr(_core.Combination, method), rank, density, majority_sign == "frequency", seed
    )


def _weights(function: str, weights: list[float]) -> list[float]:
    check_list(function, "weights", weights)
    _require(all(map(_is_real, weights)), function, "weights", "numbers", weights)
    return [float(weight) for weight in weights]
