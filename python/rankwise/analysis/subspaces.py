"""Spectra of updates, their subspaces, and what they change of a weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .._library import library
from ..adapted import Adapted
from ..config import _is_real, _require
from .updates import Update, check_integers, check_tensor, for_library, result_of

_core = library.analysis
SUBSPACES = tuple(_core.Subspace.__members__)


@dataclass(frozen=True, eq=False)
class DeltaSpectrum:
    """``dW = U diag(S) V^T``, k = min(rank, in, out); float64.

    Args:
        U: ``[out, k]``, orthonormal columns.
        S: ``[k]``, falling.
        V: ``[in, k]``, orthonormal columns.
    """

    U: Tensor
    S: Tensor
    V: Tensor


@dataclass(frozen=True)
class EffectiveRanks:
    """How many directions of a spectrum s matter; all 0 where all of it is.

    Args:
        entropy: ``exp(-sum p log p)``, ``p = s / sum s`` (Roy and Vetterli, EUSIPCO 2007).
        stable: ``sum s^2 / max s^2``.
        energy_90, energy_95, energy_99: the fewest directions with that part of ``sum s^2``.
    """

    entropy: float
    stable: float
    energy_90: int
    energy_95: int
    energy_99: int


@dataclass(frozen=True)
class Amplification:
    """How much of a weight lies along an update.

    Args:
        factor: update_norm / along_update; 0 for a zero update.
        update_norm, weight_norm: ``||dW||_F`` and ``||W||_F``.
        along_update: ``||U^T W V||_F`` with U and V the first directions of dW.
        along_weight: the same of W's own first directions, or NaN.
        along_random: the same of random orthonormal ones.
        rank: how many directions.
    """

    factor: float
    update_norm: float
    weight_norm: float
    along_update: float
    along_weight: float
    along_random: float
    rank: int


@dataclass(frozen=True, eq=False)
class IntruderDirections:
    """The first directions of W + dW, and which of them W has nothing like.

    Args:
        cosines: ``[count]``, float64: the largest ``|u^T w|`` with W's left singular vectors w.
        singular_values: ``[count]``, float64, of W + dW.
        indices: those whose cosine is below the threshold.
    """

    cosines: Tensor
    singular_values: Tensor
    indices: list[int]


def delta_spectrum(update: Update | Adapted) -> DeltaSpectrum:
    """The singular values and directions of an update.

    Args:
        update: an Update, or an adapted layer for that of its active adapter.
    """
    return result_of(
        DeltaSpectrum, _core.delta_spectrum(for_library("delta_spectrum", "update", update))
    )


def subspace_similarity(
    first: Update | Adapted, second: Update | Adapted, of: str = "input"
) -> Tensor:
    """How two updates' subspaces overlap: ``phi(i, j) = ||U1_i^T U2_j||_F^2 / min(i, j)``.

    From the paper of LoRA (arXiv 2106.09685, section 7.2). 1: the smaller subspace lies within the
    larger one; 0: they are orthogonal.

    Args:
        first, second: of any two ranks; an Update, or an adapted layer.
        of: whose directions: of the update in the input's space ("input") or the output's
            ("output"), or of a factor alone: right ones of "lora_A", left ones of "lora_B".

    Returns:
        ``[k1, k2]``, float64: phi(i, j) at ``[i - 1, j - 1]``. Directions whose singular values are
        below 1e-12 of the largest are rounding and left out. Within equal singular values phi
        depends on the basis.
    """
    function = "subspace_similarity"
    _require(of in SUBSPACES, function, "of", f"one of {SUBSPACES}", of)
    pair = for_library(function, "first", first), for_library(function, "second", second)
    return _core.subspace_similarity(*pair, getattr(_core.Subspace, of))


def effective_ranks(singular_values: Tensor) -> EffectiveRanks:
    """How many directions of a spectrum matter, such as ``delta_spectrum(update).S``.

    Args:
        singular_values: ``[k]``, not negative, in any order.
    """
    check_tensor("effective_ranks", "singular_values", singular_values)
    return result_of(EffectiveRanks, _core.effective_ranks(singular_values))


def amplification_factor(
    weight: Tensor,
    update: Update | Adapted,
    rank: int | None = None,
    seed: int = 0,
    own: bool = True,
) -> Amplification:
    """What an update amplifies: ``||dW||_F / ||U^T W V||_F``, U and V the first directions of dW.

    From the paper of LoRA (arXiv 2106.09685, section 7.3): a large factor says that the update's
    directions are there in W, but weak. W is read in blocks of rows.

    Args:
        weight: W ``[out, in]``, any dtype and device.
        update: an Update, or an adapted layer.
        rank: directions; None, or more than dW has, for all of dW's.
        seed: of the random directions.
        own: whether to compare with W's own directions. They take the eigenvalues of ``W W^T`` or
            ``W^T W``, the smaller, dense in float64, and so by far the longest; without them
            along_weight is NaN.
    """
    function = "amplification_factor"
    check_tensor(function, "weight", weight)
    check_integers(function, rank=rank, seed=seed)
    given = for_library(function, "update", update)
    return result_of(
        Amplification, _core.amplification_factor(weight, given, rank, seed, bool(own))
    )


def intruder_directions(
    weight: Tensor, update: Update | Adapted, threshold: float = 0.5, count: int = 10
) -> IntruderDirections:
    """Left singular vectors of W + dW that are like none of W's (arXiv 2410.21228).

    Takes the dense SVDs of W and W + dW in float64: minutes for ``[4096, 4096]``.

    Args:
        weight: W ``[out, in]``, any dtype and device.
        update: an Update, or an adapted layer.
        threshold: 0 to 1: an intruder's largest \\|cosine\\| with W's own is below it.
        count: the first ones of W + dW that are looked at.
    """
    function = "intruder_directions"
    check_tensor(function, "weight", weight)
    _require(_is_real(threshold), function, "threshold", "a number", threshold)
    check_integers(function, count=count)
    given = for_library(function, "update", update)
    return result_of(IntruderDirections, _core.intruder_directions(weight, given, threshold, count))
