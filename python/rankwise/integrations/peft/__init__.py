"""PEFT's own models on rankwise's operators: ``accelerate(model)`` once, everything else stays."""

try:
    import peft as _peft  # noqa: F401
except ImportError as error:
    raise ImportError(
        "rankwise.integrations.peft needs PEFT and transformers: pip install peft transformers"
    ) from error

from .installation import accelerate, restore
from .report import Report

__all__ = ["Report", "accelerate", "restore"]
