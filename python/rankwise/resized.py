"""Layers whose tokens become more or fewer, as transformers resizes a model's vocabulary.

It resizes an embedding in place, sets its num_embeddings, gives all its parameters the flag of the
weight, and assigns it to its place. A head that is tied to it then gets its out_features set. In
the place of another head it assigns a new nn.Linear that begins with the old rows: the adapted
layer stays, and takes its parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from .masters import base_dtype
from .places import place_at
from .tree import AdaptedLayer

if TYPE_CHECKING:
    from .adapted import Adapted


class Rows:
    """An attribute of adapted layers, how many rows the weight has: set, it resizes adapters."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: Adapted | None, owner: type):
        return self if layer is None else vars(layer)[self.name]

    def __set__(self, layer: Adapted, rows: int) -> None:
        before = vars(layer).get(self.name, rows)
        vars(layer)[self.name] = rows
        if rows != before:
            resize_adapters(layer, rows)


@torch.no_grad()
def resize_adapters(layer: Adapted, rows: int) -> None:
    """Lets a layer's adapters, and what it unmerges to, follow its weight to `rows` tokens.

    New tokens compute the base alone until they are trained. Parameters stay the same objects.
    """
    if layer.merged and len(layer._base_weight()) != rows:
        kept = layer._base_weight()[:rows]
        layer._base_weight().data = torch.cat([kept, layer.weight[len(kept) :]])
    embeds = isinstance(layer, nn.Embedding)
    factors = {name: getattr(layer, name) for name in ("lora_A", "lora_B", "lora_E")}
    layer._trained_before = {n: f.requires_grad for n, f in factors.items() if f is not None}
    for holder in (layer, *layer.adapters.values()):
        factor = holder.lora_A if embeds else holder.lora_B
        if holder.lora_first is not None:  # of linear layers alone
            kept = holder.lora_first.lora_B[:rows]
            more = kept.new_zeros(rows - len(kept), kept.shape[1])
            holder.lora_first.lora_B = torch.cat([kept, more])
        if factor is not None:
            kept = (factor.t() if embeds else factor)[:rows]
            resized = torch.cat([kept, kept.new_zeros(rows - len(kept), kept.shape[1])])
            factor.grad = None
            factor.data = resized.t().contiguous() if embeds else resized


def _take_assigned(parent: nn.Module, name: str, module: nn.Module | None) -> nn.Module | None:
    """What an assignment puts in the place of a layer; None for the module that is assigned."""
    layer, place = parent._modules.get(name), place_at(parent, name)
    if place is not None and base_dtype(place.module) is not None:
        place.look({name: module})  # at once, for its callers' inputs are 16-bit
    if not isinstance(layer, AdaptedLayer):
        return None
    if module is not layer:
        return _over_new_base(layer, module) if _resizes(layer, module) else None
    for name, trained in vars(layer).pop("_trained_before", {}).items():
        factor = getattr(layer, name)
        if factor is not None:
            factor.requires_grad_(trained)
    return None


def _over_new_base(layer: Adapted, module: nn.Module) -> Adapted:
    module.requires_grad_(False)
    layer.weight = module.weight
    if isinstance(layer, nn.Embedding):
        layer.padding_idx, layer.num_embeddings = module.padding_idx, module.num_embeddings
    else:
        layer.bias, layer.out_features = module.bias, module.out_features
    vars(layer).pop("_trained_before", None)
    return layer


def _resizes(layer: Adapted, module: nn.Module | None) -> bool:
    """Whether a plain module has the layer's rows to begin with, and more or fewer."""
    kind = nn.Embedding if isinstance(layer, nn.Embedding) else nn.Linear
    if type(module) is not kind or (kind is nn.Linear and layer.transposed):
        return False
    new, old = module.weight, layer.weight
    alike = (new.shape[1:], new.dtype, new.device) == (old.shape[1:], old.dtype, old.device)
    if not alike or len(new) == len(old):
        return False
    rows = min(len(new), len(old))
    return new.is_meta or torch.equal(new[:rows], old[:rows])


register_module_module_registration_hook(_take_assigned)
