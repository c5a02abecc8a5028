"""Layers that a model calls one after the other with one input, computed together at the first."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .adapted import Adapted
from .first_factors import FIRST
from .linear_group import LoRALinearGroup
from .model_adapters import ModelAdapters

# What attentions and gated feed-forward layers call their layers of one input.
NAMES: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),  # Llama, Mistral, Qwen, Gemma, OPT, ...
    ("query", "key", "value"),  # BERT, RoBERTa, ELECTRA, ViT
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("query_proj", "key_proj", "value_proj"),  # DeBERTa
    ("q", "k", "v"),  # T5, MPNet
    ("to_q", "to_k", "to_v"),  # diffusers
    ("gate_proj", "up_proj"),  # Llama, ...
    ("wi_0", "wi_1"),  # T5 1.1
    ("w1", "w3"),  # the first Llama code, Mixtral's experts
)
MISSES = 2  # in succession, until layers are apart


@dataclass
class _Waiting:
    """Outputs their layers have not been asked for yet, and what they were computed from."""

    input: Tensor
    version: int
    modes: tuple
    states: list[tuple]
    outputs: dict[int, Tensor]

    def take(self, index: int, layer: Adapted, input: Tensor) -> Tensor | None:
        """A layer's output, once, if it would compute the same now."""
        if input is not self.input or input._version != self.version:
            return None
        if _modes(input) != self.modes:
            return None
        (tensors, values), (now, values_now) = self.states[index], _state(layer)
        if values != values_now or not all(map(operator.is_, tensors, now)):
            return None
        return self.outputs.pop(index, None)


class SharedInput:
    """Layers of one module that are given the same input; `share_inputs` makes them.

    Attributes:
        names: of the layers, in the model.
        apart: whether they are computed one by one again: twice in succession a layer was given
            another input than the first one, or was not called.
    """

    def __init__(self, layers: dict[str, Adapted]) -> None:
        self.names = tuple(layers)
        self.apart = False
        self._group = LoRALinearGroup(list(layers.values()))
        self._waiting: _Waiting | None = None
        self._misses = 0

    def output_of(self, layer: Adapted, input: Tensor) -> Tensor | None:
        """layer(input), computed with the others; None where the layer is to compute it."""
        if self.apart or torch.compiler.is_compiling() or input.is_inference():
            return None
        layers = self._group.layers
        index = next((i for i in range(len(layers)) if layers[i] is layer), None)
        if index is None:  # a copy that shares the layer's attributes, as DataParallel's replicas
            return None
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            output = waiting.take(index, layer, input)
            if output is not None:
                if waiting.outputs:
                    self._waiting = waiting
                else:
                    self._misses = 0
                return output
            self._misses += 1
            self.apart = self._misses == MISSES
            if self.apart or index in waiting.outputs:
                return None
        if not all(map(_has_own_tensors, layers)):
            return None
        outputs = self._group.together(input)
        if outputs is None:
            return None
        others = dict(enumerate(outputs))
        output = others.pop(index)
        states = [_state(own) for own in layers]
        self._waiting = _Waiting(input, input._version, _modes(input), states, others)
        return output

    def __getstate__(self) -> dict:
        return vars(self) | {"_waiting": None}

    def __repr__(self) -> str:
        return f"SharedInput({', '.join(self.names)}{', apart' if self.apart else ''})"


def share_inputs(model: nn.Module, names: Sequence[Sequence[str]] = NAMES) -> list[SharedInput]:
    """Computes adapted layers that are given one input together, when the first is called.

    An attention's q, k and v, or gate and up of a feed-forward layer: the model calls them as
    before, and LoRALinearGroup computes them, which reads the input once for all their A. Files,
    names and parameters stay what they are; adapters may come and go. To be called after
    apply_lora() or load_adapter(), again where layers were replaced since.

    Values are the layers' to rounding, but for dropout, of which all have one mask. Outputs wait
    for their layers, so the first call holds what the three would hold. Nothing is taken that a
    layer would compute otherwise by then: for another input, after a change in place of the input
    or of a parameter, in another mode of autograd or autocast. Where that happens twice in
    succession, as in a cross-attention, the layers are apart for good. They are called one by one
    too under torch.compile and torch.inference_mode, and where LoRALinearGroup does so. Quantised
    layers are not shared.

    Args:
        model: with adapters.
        names: of layers of one module that share its input, with one in_features; those of common
            architectures if not given, none to end all sharing.

    Returns:
        What is shared now, in the order of the model; empty where no names fit.

    Raises:
        ValueError: the model has no adapters.
    """
    layers = ModelAdapters.of(model).layers
    for layer in layers.values():
        layer.shared_input = None
    found = []
    for members in _candidates(layers, names):
        found.append(SharedInput(members))
        for layer in members.values():
            layer.shared_input = found[-1]
    return found


def _candidates(
    layers: dict[str, Adapted], names: Sequence[Sequence[str]]
) -> Iterator[dict[str, Adapted]]:
    """{name in the model: layer} of two or more of one module whose names go together."""
    modules: dict[tuple[str, int], dict[str, str]] = {}  # {(module, in_features): {name: path}}
    for path, layer in layers.items():
        if hasattr(type(layer), "_grouped_forward"):  # not an embedding, nor a quantised layer
            module, _, name = path.rpartition(".")
            modules.setdefault((module, layer.in_features), {})[name] = path
    for own in modules.values():
        for together in names:
            members = {own[name]: layers[own[name]] for name in together if name in own}
            if len(members) > 1:
                yield members


def _modes(input: Tensor) -> tuple:
    """What outputs depend on beside their operands."""
    device = input.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return torch.is_grad_enabled(), autocast


def _has_own_tensors(layer: Adapted) -> bool:
    """Whether nothing else computes the tensors of _state(), and changes of them are counted."""
    own = layer._parameters
    if own.get("weight") is None or own.get("lora_A") is None or own.get("lora_B") is None:
        return False
    return not any(tensor is not None and tensor.is_inference() for tensor in own.values())


def _state(layer: Adapted) -> tuple[tuple, list]:
    """What its output depends on: by identity, and by value."""
    tensors = tuple(layer._parameters.values())
    first = layer._modules[FIRST]
    if first is not None:
        tensors += tuple(first._buffers.values())
    values = [None if tensor is None else tensor._version for tensor in tensors]
    values += (layer.rank, layer.training, layer.adapters_enabled)
    return (*tensors, layer.options), values
