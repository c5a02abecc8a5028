# The dense float64 oracle: every definition on dW itself, in NumPy.
import numpy as np
import torch
from hypothesis import strategies as st

import rankwise as rw

KINDS = ("random", "duplicated", "zero", "equal")


@st.composite
def shapes(draw) -> tuple[int, int]:
    return draw(st.integers(1, 12)), draw(st.integers(1, 12))


@st.composite
def factor_pairs(draw, shape=None) -> rw.analysis.Update:
    """Updates of any rank: 0, above the sides, with equal singular values, with zero factors."""
    n_out, n_in = shape or draw(shapes())
    rank, kind = draw(st.integers(0, 14)), draw(st.sampled_from(KINDS))
    make = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    A = torch.randn(rank, n_in, generator=make, dtype=torch.float64)
    B = torch.randn(n_out, rank, generator=make, dtype=torch.float64)
    if kind == "duplicated" and rank > 1:
        A[-1], B[:, 0] = A[0], B[:, -1]
    if kind == "zero":
        B.zero_()
    if kind == "equal" and 0 < rank <= min(n_out, n_in):
        A, B = torch.linalg.qr(A.t())[0].t(), torch.linalg.qr(B)[0]
    gated = draw(st.booleans())
    E = torch.randn(rank, 1, generator=make, dtype=torch.float64) if gated else None
    if kind == "equal":
        E = None
    return rw.analysis.Update(A, B, E, draw(st.sampled_from([1.0, 0.5, -2.0])))


def dense(update: rw.analysis.Update) -> np.ndarray:
    E = 1 if update.lora_E is None else update.lora_E.double().numpy()
    A, B = update.lora_A.double().numpy(), update.lora_B.double().numpy()
    return update.scaling * B @ (E * A)


def norm(matrix: np.ndarray) -> float:
    return float(np.sqrt((matrix**2).sum()))


def svd(matrix: np.ndarray):
    """U, s, V of the known directions."""
    U, s, Vh = np.linalg.svd(matrix, full_matrices=False)
    known = int((s > 1e-12 * s[0]).sum()) if s.size else 0
    return U[:, :known], s[:known], Vh[:known].T


def similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """From two bases of directions, entry by entry."""
    grid = np.zeros((first.shape[1], second.shape[1]))
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            grid[i, j] = norm(first[:, : i + 1].T @ second[:, : j + 1]) ** 2 / (min(i, j) + 1)
    return grid


def clusters(s: np.ndarray) -> list[int]:
    """The numbers of directions at which the subspace is one's own: not within equal values."""
    return [i for i in range(len(s)) if i + 1 == len(s) or s[i] - s[i + 1] > 1e-4 * s[0]]
