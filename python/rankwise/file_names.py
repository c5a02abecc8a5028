"""Tensors' names in PEFT's folders: which modules they can name."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ._library import library
from .tree import plain_state


def check_savable(whole: Mapping[str, nn.Module]) -> None:
    """Refuses modules whose tensors' names PEFT's files take for something else's.

    Raises:
        ValueError: naming the module and the tensor.
    """
    saved = library.AdapterKey.Part.saved
    for path, module in whole.items():
        for key in plain_state(module):
            owner, _, parameter = f"{path}.{key}".rpartition(".")
            read = library.parse_adapter_key(str(library.AdapterKey(owner, saved, parameter)))
            if read is None or read.part != saved:
                raise ValueError(
                    f"modules_to_save: {path!r} could be trained but not saved: in PEFT's files "
                    f"the name of its tensor '{owner}.{parameter}' means a LoRA factor; rename "
                    "what begins with 'lora_'"
                )
