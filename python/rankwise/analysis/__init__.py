"""What adapters are and how they compare: spectra, subspaces, distances, combinations.

An update is ``dW = scaling * B diag(E) A``, ``[out, in]``. It is seen through its factors, by QRs
and an SVD of ``[rank, rank]`` in float64 on the CPU whatever their dtype and device, and formed
only where that is said. Results are the same bits for every number of threads. What is wrong,
infinite or NaN is a ValueError that says function, argument, wanted and got.
"""

from .combinations import Approximation, combine, combine_folders, truncate
from .distances import Distance, FunctionComparison, distance, distances, same_function
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
    "Amplification",
    "Approximation",
    "DeltaSpectrum",
    "Distance",
    "EffectiveRanks",
    "FunctionComparison",
    "IntruderDirections",
    "Update",
    "amplification_factor",
    "combine",
    "combine_folders",
    "delta_spectrum",
    "distance",
    "distances",
    "effective_ranks",
    "intruder_directions",
    "same_function",
    "subspace_similarity",
    "truncate",
    "updates",
]
