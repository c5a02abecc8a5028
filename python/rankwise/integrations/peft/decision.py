"""Whether our operators may compute a call of a PEFT layer, and why not.

What only a method of PEFT can change is looked at once, and again when the layer's active adapters,
its base or their modules are others. All else is looked at in each call: a few dictionaries.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.pytorch_utils import Conv1D

from ...config import NARROW

PLAIN = frozenset({Tensor, nn.Parameter, FakeTensor})
SIXTEEN = frozenset(NARROW)
FLOATS = frozenset({torch.float64, torch.float32, *SIXTEEN})

MERGED, DISABLED, NO_ADAPTER = "merged", "disabled", "no active adapter"
ARGUMENTS, VARIANT = "arguments", "variant"
# What no operator is meant for; all other calls are eligible (make peft-tests counts them).
INELIGIBLE = frozenset({MERGED, DISABLED, NO_ADAPTER, ARGUMENTS, VARIANT})
_NO_REASON = frozenset({"adapter_names", "alora_offsets"})  # given as None by PEFT's own hooks


class Calls:
    """A layer's record: how many calls our operators computed, why PEFT computed the others.

    A copy is a new one.
    """

    __slots__ = ("first_ranks", "fused", "others", "plan")

    def __init__(self) -> None:
        self.fused, self.others, self.first_ranks = 0, Counter(), {}
        self.plan: Plan | None = None

    def __reduce__(self):
        return Calls, ()

    def note(self, reason: str | None) -> None:
        """One more call."""
        if reason is None:
            self.fused += 1
        else:
            self.others[reason] += 1


class Adapter(NamedTuple):
    """An active adapter as a layer has it: PEFT's modules, or for AdaLoRA its parameters."""

    name: str
    lora_A: nn.Module | nn.Parameter | None  # None: the layer has no such adapter
    lora_B: nn.Module | nn.Parameter | None
    dropout: nn.Module | None


class Plan(NamedTuple):
    """How a layer is computed as long as all of this stays the same."""

    active: str | list[str]
    base: nn.Module
    base_class: type
    product: type | None  # nn.Linear or Conv1D where the base computes as that; else it does itself
    watched: tuple[Adapter, ...]
    adapters: tuple[Adapter, ...]  # those of the watched that are here


def has_arguments(args: tuple, kwargs: dict) -> bool:
    """Whether a call has arguments that mean something."""
    return bool(args) or any(
        value is not None or name not in _NO_REASON for name, value in kwargs.items()
    )


def unhooked(module: nn.Module) -> dict | None:
    """A module's own state; None where calling it may do more than its class's forward.

    By its dictionary: each attribute of a module that is asked for takes three times as long.
    """
    state = module.__dict__
    if (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    ):
        return None
    return state


def product_of(base: nn.Module) -> type | None:
    """nn.Linear, Conv1D or nn.Embedding where a class of modules computes just as that one."""
    for kind in (nn.Linear, Conv1D, nn.Embedding):
        if isinstance(base, kind):
            own = type(base)
            same = own.forward is kind.forward and own.__call__ is nn.Module.__call__
            return kind if same and not hasattr(own, "embed_scale") else None
    return None


def plain_parameters(base: nn.Module, product: type | None) -> dict | None:
    """The parameters that a base of this product computes with; None where it is to be called."""
    state = unhooked(base) if product is not None else None
    if state is None:
        return None
    parameters = state["_parameters"]  # what is parametrised is not there
    bias = parameters.get("bias", ...)
    if type(parameters.get("weight")) not in PLAIN:
        return None
    plain_bias = bias is None or type(bias) in PLAIN or product is nn.Embedding
    return parameters if plain_bias else None


def dropout_of(module: nn.Module) -> float | None:
    """The probability that a dropout module applies now; None where it is to be called."""
    state, kind = unhooked(module), type(module)
    if state is None:
        return None
    if kind is nn.Identity:
        return 0.0
    if kind is nn.Dropout:
        return state["p"] if state["training"] else 0.0
    return None


def factors_fit(weight: torch.dtype, A: Tensor, B: Tensor) -> bool:
    """Whether factors have the base's type, or are float32 over a 16-bit base."""
    dtype = A.dtype
    if B.dtype is not dtype or weight not in FLOATS:
        return False
    return dtype is weight or (dtype is torch.float32 and weight in SIXTEEN)


def fitting(x: Tensor, weight: torch.dtype, A: Tensor, B: Tensor) -> str | None:
    """Why tensors of these types are not for lora_linear; None where they are."""
    if x.dtype is weight and factors_fit(weight, A, B):
        return None
    types = {x.dtype, weight, A.dtype, B.dtype}
    if torch.is_autocast_enabled(x.device.type) and types <= {torch.float32, *SIXTEEN}:
        return None
    return f"{x.dtype} input on {weight} base with {A.dtype} adapter".replace("torch.", "")
