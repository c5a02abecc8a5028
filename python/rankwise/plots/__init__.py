"""Pictures of ranks, budgets, spectra and sweeps; each function returns a matplotlib Figure.

``figure.savefig("ranks.png")`` or ``.svg`` writes it. They use neither pyplot nor rcParams, so that
a program's own pictures stay as they are. What is wrong is a ValueError or TypeError that says
function, argument, wanted and got.
"""

try:
    import matplotlib as _  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'rankwise.plots needs matplotlib: pip install "rankwise[plots]"'
    ) from error

from .budgets import budget_curve
from .ranks import rank_map, ranks_over_time
from .subspaces import similarity_grid
from .sweeps import sweep_curves
from .updates import amplification, spectra

__all__ = [
    "amplification",
    "budget_curve",
    "rank_map",
    "ranks_over_time",
    "similarity_grid",
    "spectra",
    "sweep_curves",
]
