# How far a result may lie from the float64 oracle: one table with reasons, one way to compare.
"""A limit is `units * u * magnitude + floor`, element by element.

u is the unit roundoff of the result's dtype (half the spacing at 1). The magnitude is what the
same formula gives with every term replaced by its absolute value, so cancellation widens the
limit and nothing else does: a wrong index or a missing term of ordinary size always shows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Tolerance:
    units: float
    floor: float
    reason: str


TOLERANCES = {
    torch.float64: Tolerance(16, 1e-300, "sums of n <= 400 terms in any order: about sqrt(n) u"),
    torch.float32: Tolerance(16, 1e-37, "sums of n <= 400 terms in any order: about sqrt(n) u"),
    torch.bfloat16: Tolerance(
        4, 1e-37, "sums in float32; rounded to bfloat16: hidden, its gate, the update, the result"
    ),
    torch.float16: Tolerance(
        4, 2.4e-7, "as bfloat16; the floor is four subnormal spacings (2**-24) of float16"
    ),
}


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def limit(dtype: torch.dtype, magnitude: np.ndarray, units: float | None = None) -> np.ndarray:
    """Largest allowed |result - oracle| per element; `units` replaces the table's figure."""
    tolerance = TOLERANCES[dtype]
    factor = tolerance.units if units is None else units
    return factor * unit_roundoff(dtype) * np.abs(magnitude) + tolerance.floor


def assert_close(
    actual: torch.Tensor,
    expected: np.ndarray,
    magnitude: np.ndarray,
    what: str,
    *,
    dtype: torch.dtype | None = None,
    units: float | None = None,
) -> None:
    """Fails with the largest difference and its place when `actual` leaves the limit.

    `dtype` is the one whose rounding counts (default: that of `actual`).
    """
    dtype = dtype or actual.dtype
    assert tuple(actual.shape) == expected.shape, (
        f"{what}: shape must be {expected.shape}, got {tuple(actual.shape)}"
    )
    if actual.numel() == 0:
        return
    got = actual.detach().cpu().to(torch.float64).numpy()
    difference = np.abs(got - expected)
    allowed = limit(dtype, magnitude, units)
    bad = ~(difference <= allowed)
    if bad.any():
        ratio = np.where(np.isnan(difference), np.inf, difference / allowed)
        worst = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
        place = tuple(int(i) for i in worst)
        raise AssertionError(
            f"{what} ({dtype}): {int(bad.sum())} of {bad.size} elements differ too much; "
            f"the worst at {place}: got {got[worst]!r}, wanted {expected[worst]!r}, "
            f"difference {difference[worst]:.3e}, allowed {allowed[worst]:.3e}; "
            f"largest difference anywhere {np.nanmax(difference):.3e}"
        )


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Fails unless both have the same dtype, shape and bytes (-0 is not 0, NaN equals itself)."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} is not {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {actual.shape} is not {expected.shape}"
    a = actual.detach().contiguous().reshape(-1).view(torch.uint8)
    b = expected.detach().contiguous().reshape(-1).view(torch.uint8)
    if not torch.equal(a, b):
        difference = (actual.double() - expected.double()).abs()
        raise AssertionError(
            f"{what}: {int((difference != 0).sum())} of {difference.numel()} elements differ, "
            f"the largest by {difference.max().item():.3e} at flat index {int(difference.argmax())}"
        )
