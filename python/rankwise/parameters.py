"""A model's parameters: how many train, and groups of them for an optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor, nn

from .adapted import Adapted
from .model_adapters import ModelAdapters
from .sharding import check_not_flat, reshard


def parameter_groups(
    model: nn.Module,
    lr: float,
    ratio: float = 16.0,
    embedding_lr: float = 1e-6,
    e_ratio: float = 1.0,
) -> list[dict]:
    """The trainable parameters in groups for LoRA+ (arXiv 2402.12354), for any torch optimizer.

    As in PEFT's create_loraplus_optimizer, but that modules trained whole are all in the first
    group, and that only the group of lora_E has a weight decay of its own.

    Args:
        model: with an active adapter.
        lr: of lora_A and of all that is trained besides the adapter.
        ratio: lora_B learns at ratio * lr; finite, positive.
        embedding_lr: of both factors of embeddings.
        e_ratio: AdaLoRA's lora_E learns at e_ratio * lr; finite, positive. It starts at zero behind
            two small factors, so that more than 1 suits it. Another ratio than 1 makes a group of
            its own, without weight decay, which would pull directions down that pruning weighs.

    Returns:
        [{"params": [...], "lr": ...}, ...], in this order, without empty groups.

    Raises:
        ValueError: the model has no adapters, or nothing trains.
    """
    for name, value in (("ratio", ratio), ("e_ratio", e_ratio)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"parameter_groups: {name} must be finite and positive, got {value!r}")
    reshard(model)
    check_not_flat("parameter_groups", model)
    groups: dict[str, list[nn.Parameter]] = {
        "first": [], "lora_B": [], "embedding": [], "lora_E": []
    }  # fmt: skip
    group_of = {}
    for layer in ModelAdapters.of(model).layers.values():
        for name, parameter in layer.named_parameters():
            group_of[id(parameter)] = _group(layer, name)
    for parameter in model.parameters():
        if parameter.requires_grad:
            group = group_of.get(id(parameter), "first")
            groups["first" if group == "lora_E" and e_ratio == 1 else group].append(parameter)
    if not any(groups.values()):
        raise ValueError("parameter_groups: nothing trains; call activate_adapter(model, name)")
    options = {
        "first": {"lr": lr},
        "lora_B": {"lr": lr * ratio},
        "embedding": {"lr": embedding_lr},
        "lora_E": {"lr": lr * e_ratio, "weight_decay": 0.0},
    }
    return [{"params": own, **options[name]} for name, own in groups.items() if own]


def _group(layer: Adapted, name: str) -> str:
    factor = name.removeprefix("parametrizations.").startswith("lora_")
    if not factor:
        return "first"
    if isinstance(layer, nn.Embedding):
        return "embedding"
    return next((factor for factor in ("lora_B", "lora_E") if factor in name), "first")


def print_trainable_parameters(model: nn.Module) -> None:
    """Prints how many parameters train, in PEFT's words and counted as PEFT does.

    All adapters count, and of modules trained whole also the base's; an AdaLoRA layer counts for
    one more, whose rank is a parameter in PEFT; packed 4-bit weights for the numbers in them.

    Raises:
        ValueError: the model has no adapters.
    """
    trainable, total = _counts(model)
    share = 100 * trainable / total
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")


def _counts(model: nn.Module) -> tuple[int, int]:
    reshard(model)
    check_not_flat("print_trainable_parameters", model)
    state = ModelAdapters.of(model)
    whole = [m for p in state.places for m in (p.original, *(c.module for c in p.copies.values()))]
    own = list(model.parameters())
    everything = {id(p): p for p in [*own, *(p for m in whole for p in m.parameters())]}
    ranks = sum(
        layer.held_adapter(name).options.triplets
        for layer in state.layers.values()
        for name in layer.adapter_names
    )
    return _numbers(p for p in own if p.requires_grad), _numbers(everything.values()) + ranks


def _numbers(parameters: Iterable[Tensor]) -> int:
    return sum(_number(parameter) for parameter in parameters)


def _number(parameter: Tensor) -> int:
    """Of values, also where DeepSpeed has them elsewhere or bitsandbytes packs two in a byte."""
    count = int(parameter.numel()) or getattr(parameter, "ds_numel", 0)
    packed = type(parameter).__name__ == "Params4bit"
    return count * 2 * parameter.element_size() if packed else count
