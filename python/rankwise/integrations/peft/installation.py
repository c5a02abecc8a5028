"""Putting our layers into a model with PEFT's, and taking them out again."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ...quantised import keep_differentiable
from .layers import give_back, take
from .report import Report
from .tuners import give_tuner_back, take_tuner

_SEEN = "_rankwise_peft_adapters"


def accelerate(model: nn.Module) -> Report:
    """Runs a model's PEFT layers on rankwise's operators, in place.

    Plain LoRA of linear and embedding layers and AdaLoRA of linear layers are taken; all else is
    left to PEFT and named in the report. The model stays PEFT's, and so do all of its methods:
    layers become instances of subclasses of their own class, nothing else of them changes. Layers
    that are added later are taken too. The allocator of a model in AdaLoRA training is ours then:
    ``model.base_model.rankallocator.attach(optimizer)`` once, or ``update_and_allocate(step)`` as
    before. Calling it again takes what was added in other ways.

    Args:
        model: a PeftModel, a PeftMixedModel, a transformers model after add_adapter() or
            load_adapter(), a model of inject_adapter_in_model(), or anything that holds one.

    Raises:
        ValueError: the model has no PEFT layer, or an AdaLoRA schedule that cannot be.
    """
    if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "accelerate: the model has no PEFT layer: give it an adapter with peft.get_peft_model "
            "or add_adapter before, or use rankwise.apply_lora, which needs no PEFT"
        )
    keep_differentiable(model)
    tuners = [module for module in model.modules() if isinstance(module, BaseTuner)]
    for tuner in tuners:
        take_tuner(tuner)
    in_tuners = {module for tuner in tuners for module in tuner.modules()}
    for module in list(model.modules()):
        take(module)
        if isinstance(vars(module).get("peft_config"), dict) and module not in in_tuners:
            _watch(module)
    return Report(model, restore)


def restore(model: nn.Module) -> None:
    """Undoes accelerate(): all layers, tuners and allocators are PEFT's own again."""
    for module in model.modules():
        give_tuner_back(module)
        give_back(module)
        if vars(module).pop(_SEEN, None) is not None:
            hooks = module._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if hook is _take_added]:
                del hooks[key]


def _watch(model: nn.Module) -> None:
    """Has a model without a tuner, to which adapters are added by PEFT's functions, looked at."""
    if _SEEN not in vars(model):
        model.register_forward_pre_hook(_take_added)
    vars(model)[_SEEN] = tuple(model.peft_config)


def _take_added(model: nn.Module, args: tuple) -> None:
    """Before a call: takes the layers of adapters that were added since."""
    if tuple(model.peft_config) != vars(model)[_SEEN]:
        for module in model.modules():
            take(module)
        _watch(model)
