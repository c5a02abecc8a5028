"""Adapters of a layer on the meta device, which holds no values: theirs can be there before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from .adapted import Adapted, StoredAdapter

FACTORS = ("lora_A", "lora_B", "lora_E")


def _factors(holder: Adapted | StoredAdapter) -> dict[str, nn.Parameter]:
    factors = {name: getattr(holder, name) for name in FACTORS}
    return {name: factor for name, factor in factors.items() if factor is not None}


def realise(layer: Adapted, holder: Adapted | StoredAdapter, device: torch.device) -> None:
    """Gives an adapter of the layer that is on the meta device its first values elsewhere."""
    factors = _factors(holder)
    if any(factor.is_meta for factor in factors.values()):
        for name, factor in factors.items():
            values = torch.zeros_like(factor, device=device)
            holder.register_parameter(name, nn.Parameter(values, factor.requires_grad))
        layer._reset_adapter(holder)


def follow_base(layer: Adapted) -> None:
    """After the base's weights came: adapters go there too, or get their first values there."""
    device = layer._base_weight().device
    if device.type == "meta":
        return
    for holder in (layer, *layer.adapters.values()):
        realise(layer, holder, device)
        for factor in _factors(holder).values():
            if factor.device != device:
                factor.data = factor.data.to(device)
        if holder.lora_first is not None:
            holder.lora_first.to(device)


@contextmanager
def values_kept(layer: Adapted) -> Iterator[None]:
    """Around a move of the layer, also by to_empty(): adapters keep values that the base lacks."""
    holders = (layer, *layer.adapters.values()) if layer._base_weight().is_meta else ()
    found = [(holder, n, f.detach()) for holder in holders for n, f in _factors(holder).items()]
    yield
    for holder, name, values in found:
        factor = getattr(holder, name)
        if not (values.is_meta or factor.is_meta):
            factor.data.copy_(values)
