"""What adapters are and how they compare: spectra, subspaces, distances, sums, advice on ranks.

An update is ``dW = scaling * B diag(E) A``, ``[out, in]``. It is seen through its factors, by QRs
and an SVD of ``[rank, rank]`` in float64 on the CPU whatever their dtype and device, and formed
only where that is said. Results are the same bits for every number of threads. What is wrong,
infinite or NaN is a ValueError that says function, argument, wanted and got.
"""

from .advice import RankAdvice, rank_advice
from .agreement import Agreement, agreement, seed_agreement
from .combinations import Approximation, combine, combine_folders, truncate
from .distances import Distance, FunctionComparison, distance, distances, same_function
from .evidence import allocated_ranks, input_variances, squared_gradients, update_energies
from .scores import DirectionScores, MatrixScores
from .subspaces import (
    Amplification,
    DeltaSpectrum,
    EffectiveRanks,
    IntruderDirections,
    amplification_factor,
    delta_spectrum,
    effective_ranks,
    intruder_directions,
    subspace_similarity,
)
from .updates import Update, updates

__all__ = [
    "Agreement",
    "Amplification",
    "Approximation",
    "DeltaSpectrum",
    "DirectionScores",
    "Distance",
    "EffectiveRanks",
    "FunctionComparison",
    "IntruderDirections",
    "MatrixScores",
    "RankAdvice",
    "Update",
    "agreement",
    "allocated_ranks",
    "amplification_factor",
    "combine",
    "combine_folders",
    "delta_spectrum",
    "distance",
    "distances",
    "effective_ranks",
    "input_variances",
    "intruder_directions",
    "rank_advice",
    "same_function",
    "seed_agreement",
    "squared_gradients",
    "subspace_similarity",
    "truncate",
    "update_energies",
    "updates",
]
