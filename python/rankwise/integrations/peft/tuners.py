"""PEFT's tuners, the models inside of a PeftModel, whose new layers are ours."""

from __future__ import annotations

import torch
from peft.tuners import adalora, lora, mixed
from torch import nn

from .allocator import PeftRankAllocator, allocator_for
from .layers import take


class LoraModel(lora.LoraModel):
    @staticmethod
    def _create_new_module(*args, **kwargs) -> nn.Module:
        return take(lora.LoraModel._create_new_module(*args, **kwargs))


class MixedModel(mixed.MixedModel):
    @staticmethod
    def _create_new_module(*args, **kwargs) -> nn.Module:
        return take(mixed.MixedModel._create_new_module(*args, **kwargs))


class AdaLoraModel(adalora.AdaLoraModel):
    """Its `rankallocator` is a PeftRankAllocator where it has one."""

    @staticmethod
    def _create_new_module(*args, **kwargs) -> nn.Module:
        return take(adalora.AdaLoraModel._create_new_module(*args, **kwargs))

    def forward(self, *args, **kwargs):
        """The model's outputs; in training their loss has the orthogonality penalty added."""
        outputs = self.model.forward(*args, **kwargs)
        allocator, loss = vars(self).get("rankallocator"), getattr(outputs, "loss", None)
        if isinstance(loss, torch.Tensor) and self.training and torch.is_grad_enabled():
            if isinstance(allocator, PeftRankAllocator) and allocator.orthogonality_weight > 0:
                penalty = allocator.orthogonality_penalty("mean_norm")
                outputs.loss = loss + allocator.orthogonality_weight * penalty.to(loss)
        return outputs

    def update_and_allocate(self, global_step: int) -> None:
        """A step by hand, after optimizer.step() and before the gradients are cleared.

        Does nothing, and says so once, when the allocator is attached to an optimizer.

        Args:
            global_step: the step's number, counted from 0 or 1.
        """
        if isinstance(self.rankallocator, PeftRankAllocator):
            self.rankallocator.allocate_at(global_step)


TUNERS = {
    lora.LoraModel: LoraModel,
    mixed.MixedModel: MixedModel,
    adalora.AdaLoraModel: AdaLoraModel,
}
PEFT_TUNERS = {ours: stock for stock, ours in TUNERS.items()}


def take_tuner(tuner: nn.Module) -> None:
    """Makes it one of ours where it is one of those."""
    ours = TUNERS.get(type(tuner))
    if ours is None:
        return
    if ours is AdaLoraModel:
        allocator = allocator_for(tuner)
        if allocator is not None:
            tuner.rankallocator = allocator
    tuner.__class__ = ours


def give_tuner_back(tuner: nn.Module) -> None:
    """Undoes take_tuner(): PEFT's allocator is there again as it was."""
    stock = PEFT_TUNERS.get(type(tuner))
    if stock is None:
        return
    tuner.__class__ = stock
    allocator = vars(tuner).get("rankallocator")
    if isinstance(allocator, PeftRankAllocator):
        allocator.detach()
        tuner.rankallocator = allocator.replaced
