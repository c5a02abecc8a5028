# The oracle: lora_linear and its six gradients in NumPy float64, from closed formulas by hand.
"""Shares no code with the library: written from the formula and the mask's definition alone.

With T tokens, X [T, in], D the dropout factor of each element (0 or the keep scale), r directions:

    Xd = D * X          H = Xd A^T  [T, r]         G = H * e^T
    Y  = X W^T + b + s G B^T
    dG = s dY B         dH = dG * e^T
    dX = dY W + D * (dH A)       dW = dY^T X       db = sum_t dY
    dA = dH^T Xd                 dB = s dY^T G     de = sum_t dG * H

Rows (columns of B) behind the active `rank` take no part and have zero gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# --- Philox4x32 (Salmon, Moraes, Dror, Shaw, SC 2011) and the dropout mask made of it ---

_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: np.ndarray, key: tuple[int, int], rounds: int = 7) -> np.ndarray:
    """uint64 [n, 4] counters of 32-bit words -> uint64 [n, 4] words, each below 2**32."""
    x0, x1, x2, x3 = (counter[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(rounds):
        first, second = _MULTIPLIERS[0] * x0, _MULTIPLIERS[1] * x2
        x0, x1, x2, x3 = (
            (second >> _WORD) ^ x1 ^ np.uint64(k0),
            second & _LOW,
            (first >> _WORD) ^ x3 ^ np.uint64(k1),
            first & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) % 2**32, (k1 + _WEYL[1]) % 2**32
    return np.stack([x0, x1, x2, x3], axis=1)


def dropout_threshold(p: float) -> int:
    """Numbers 0..65535 below this one are dropped: p * 65536 to the nearest, ties to even."""
    return round(p * 65536)


def dropout_keep_scale(p: float) -> float:
    kept = 65536 - dropout_threshold(p)
    return 65536 / kept if kept else 0.0


def dropout_mask(seed: int, rows: int, cols: int, p: float) -> np.ndarray:
    """float64 [rows, cols] of 0 and 1; element i = row * cols + col depends on (seed, i) alone."""
    count = rows * cols
    blocks = np.arange((count + 7) // 8, dtype=np.uint64)
    nothing = np.zeros_like(blocks)
    counter = np.stack([blocks & _LOW, blocks >> _WORD, nothing, nothing], axis=1)
    unsigned = seed % 2**64
    words = philox4x32(counter, (unsigned % 2**32, unsigned >> 32))
    halves = np.stack([words & np.uint64(0xFFFF), words >> np.uint64(16)], axis=2)
    numbers = halves.reshape(-1)[:count].reshape(rows, cols)
    return (numbers >= dropout_threshold(p)).astype(np.float64)


# --- The layer ---


@dataclass(frozen=True)
class Problem:
    """All arrays float64. `factor` is D above, or None without dropout; `gate` None without E."""

    x: np.ndarray  # [..., in]
    weight: np.ndarray  # [out, in]
    bias: np.ndarray | None  # [out]
    A: np.ndarray  # [capacity, in]
    B: np.ndarray  # [out, capacity]
    gate: np.ndarray | None  # [capacity, 1]
    scaling: float
    rank: int
    factor: np.ndarray | None = None  # [tokens, in]

    def tokens(self) -> int:
        return int(np.prod(self.x.shape[:-1], dtype=np.int64))

    def absolute(self) -> Problem:
        """The problem whose solution bounds the size of the terms summed in this one."""
        return Problem(
            np.abs(self.x), np.abs(self.weight), None if self.bias is None else np.abs(self.bias),
            np.abs(self.A), np.abs(self.B), None if self.gate is None else np.abs(self.gate),
            abs(self.scaling), self.rank, self.factor,
        )  # fmt: skip


def _terms(p: Problem) -> tuple[np.ndarray, ...]:
    flat = p.x.reshape(p.tokens(), p.x.shape[-1])
    dropped = flat if p.factor is None else flat * p.factor
    gate = np.ones((p.rank,)) if p.gate is None else p.gate[: p.rank, 0]
    hidden = dropped @ p.A[: p.rank].T
    return flat, dropped, gate, hidden


def forward(p: Problem) -> np.ndarray:
    """y [..., out]."""
    flat, _, gate, hidden = _terms(p)
    y = flat @ p.weight.T + p.scaling * ((hidden * gate) @ p.B[:, : p.rank].T)
    if p.bias is not None:
        y = y + p.bias
    return y.reshape(*p.x.shape[:-1], p.weight.shape[0])


def hidden(p: Problem) -> np.ndarray:
    """drop(x) A^T of the active directions, [tokens, rank], unscaled."""
    return _terms(p)[3]


def gradients(p: Problem, grad_output: np.ndarray) -> dict[str, np.ndarray]:
    """Gradients of sum(y * grad_output), keyed x W b A B E, in the shapes of their tensors."""
    flat, dropped, gate, h = _terms(p)
    dy = grad_output.reshape(p.tokens(), p.weight.shape[0])
    active_A, active_B = p.A[: p.rank], p.B[:, : p.rank]
    d_gated = p.scaling * (dy @ active_B)
    d_hidden = d_gated * gate
    d_dropped = d_hidden @ active_A
    dA, dB, dE = np.zeros_like(p.A), np.zeros_like(p.B), np.zeros((p.A.shape[0], 1))
    dA[: p.rank] = d_hidden.T @ dropped
    dB[:, : p.rank] = p.scaling * (dy.T @ (h * gate))
    dE[: p.rank, 0] = (d_gated * h).sum(axis=0)
    dx = dy @ p.weight + (d_dropped if p.factor is None else d_dropped * p.factor)
    return {
        "x": dx.reshape(p.x.shape),
        "W": dy.T @ flat,
        "b": dy.sum(axis=0),
        "A": dA,
        "B": dB,
        "E": dE,
    }
