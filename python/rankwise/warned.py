"""Warnings that point at the program's line, and not at what is between it and the package."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

_BETWEEN = {"rankwise", "torch", "transformers", "accelerate", "peft", "trl", "contextlib"}


def warn(message: str) -> None:
    """A UserWarning at the nearest line outside of this package and of the libraries that call it.

    Python shows a warning once for each such line. A line of a library's would be shown once for
    the whole program, and tell nobody where to look.
    """
    frame, level = sys._getframe(1), 2
    while _is_between(frame) and frame.f_back is not None:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def _is_between(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").split(".")[0] in _BETWEEN
