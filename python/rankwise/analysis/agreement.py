"""What two trainings of one model agree on beyond chance."""

from __future__ import annotations

import os
from dataclasses import dataclass

from torch import nn

from .._library import library
from ..adapted import Adapted
from ..config import _require
from .scores import MatrixScores
from .subspaces import SUBSPACES
from .updates import Update, for_library, result_of, sizes_of, updates


@dataclass(frozen=True)
class Agreement:
    """What the subspaces of two updates of one matrix share.

    Args:
        directions: how many, of each on average, lie within the other's subspace by more than
            random ones do: by three standard deviations of those, as about one in a hundred is.
        overlap: ``||U1^T U2||_F^2``, 0 to the smaller rank.
        chance: what random subspaces of these ranks, r1 and r2, have on average, ``r1 r2 / n``.
    """

    directions: float
    overlap: float
    chance: float


def agreement(first: Update | Adapted, second: Update | Adapted, of: str = "input") -> Agreement:
    """How many directions two updates share beyond chance, such as those of two seeds.

    A direction's part in the other's subspace, of r directions among n, is ``r / n`` on average for
    a random one, with the variance ``2 r (n - r) / (n^2 (n + 2))``. Where r is nearly n, every
    direction is within, and nothing can be told: 0.

    Args:
        first, second, of: as in subspace_similarity.
    """
    function = "agreement"
    _require(of in SUBSPACES, function, "of", f"one of {SUBSPACES}", of)
    pair = for_library(function, "first", first), for_library(function, "second", second)
    core = library.analysis
    return result_of(Agreement, core.agreement(*pair, getattr(core.Subspace, of)))


def seed_agreement(
    first: str | os.PathLike | nn.Module, second: str | os.PathLike | nn.Module, of: str = "input"
) -> MatrixScores:
    """How many directions two trainings from different seeds agree on, matrix by matrix.

    What both find is of the task; what one alone finds may be of its seed (LoRA, arXiv 2106.09685,
    section 7.2). Costs a second training, and two QRs of each factor.

    Args:
        first, second: PEFT folders or models with the same modules.
        of: whose directions, as in subspace_similarity. LoRA's A begins at random and moves
            slowly, so after a short training "output" agrees on more than "input".
    """
    found = updates(first), updates(second)
    differing = sorted(found[0].keys() ^ found[1].keys())
    if differing:
        raise ValueError(
            f"seed_agreement: both must adapt the same modules, got {differing[0]!r} in one alone"
        )
    scores = {
        module: agreement(update, found[1][module], of).directions
        for module, update in found[0].items()
    }
    return MatrixScores(scores, sizes_of(found[0]), "directions agreed on")
