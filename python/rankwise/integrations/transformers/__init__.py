"""transformers' Trainer: adapter-only checkpoints, and AdaLoRA by one callback."""

try:
    import transformers as _  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "rankwise.integrations.transformers needs transformers: pip install transformers"
    ) from error

from .adalora import AdaLoRACallback
from .checkpoints import AdapterCallback

__all__ = ["AdaLoRACallback", "AdapterCallback"]
