"""Layers that share their input, called as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from . import ops
from .adapted import Adapted
from .computed import tensors_of

_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)


class LoRALinearGroup:
    """Layers that share their input, such as an attention's q, k and v, called as one.

    ``group(x)`` is ``[layer(x) for layer in layers]`` with one pass over x for all the layers' A,
    and one sum for its gradient. The layers stay modules where they are, with their names, files
    and hooks: the group is no module, holds no parameters and follows whatever becomes of them, so
    that a copy or a pickle of their owner has a group of its own layers.

    Without dropout values are those of the layers to rounding. With dropout one mask of x serves
    all layers, where each has its own otherwise. All outputs have one node in autograd's graph: a
    backward pass through one of them frees what the others need, unless it retains the graph.

    Layers are called one by one where they are not alike or not plain: other dropouts or factor
    dtypes, merged, disabled, without an active adapter, quantised, with hooks or a forward put in
    the place of theirs, under torch.compile, or for inputs that are sparse, nested or of another
    class.

    Args:
        layers: LoRALinear, AdaLoRALinear or quantised layers, at least one, of one in_features.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = tuple(layers)
        for layer in self.layers:
            if not isinstance(layer, Adapted) or isinstance(layer, nn.Embedding):
                raise TypeError(
                    "LoRALinearGroup: layers must be adapted linear layers, got "
                    f"{type(layer).__name__}"
                )
        sizes = [layer.in_features for layer in self.layers]
        if len(set(sizes)) != 1:
            raise ValueError(
                "LoRALinearGroup: layers must be at least one, of one in_features, got in_features "
                f"{sizes}"
            )

    def __call__(self, input: Tensor) -> list[Tensor]:
        """The layers' outputs [..., out_features] for an input [..., in_features], in order."""
        outputs = self.together(input)
        return [layer(input) for layer in self.layers] if outputs is None else outputs

    def together(self, input: Tensor) -> list[Tensor] | None:
        """The outputs from one call; None where the layers are to be called one by one."""
        operands = self._operands(input)
        if operands is None:
            return None
        tensors, scaling, dropouts, ranks = zip(*operands, strict=True)
        lists = map(list, zip(*tensors, strict=True))
        options = dict(scaling=list(scaling), dropout_p=dropouts[0], ranks=list(ranks))
        return ops.lora_linear_group(input, *lists, **options)

    def _operands(self, input: Tensor) -> list[tuple] | None:
        """The layers' operands; None where they are to be called one by one."""
        if torch.compiler.is_compiling() or not _is_plain(input):
            return None
        if any(getattr(torch_module, hooks) for hooks in _GLOBAL_HOOKS):
            return None
        operands = [_operands(layer) for layer in self.layers]
        if None in operands:
            return None
        alike = {(A.dtype, p) for (_, _, A, *_), _, p, _ in operands}
        return operands if len(alike) == 1 else None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.layers))})"


def _operands(layer: nn.Module) -> tuple[tuple, float, float, int] | None:
    """lora_linear's tensors behind the input, scaling, dropout_p and rank; None where a call of the
    layer is anything else."""
    if not (_is_forward_alone(layer) and layer.adapter_in_use):
        return None
    weight, bias, E = tensors_of(layer, "weight", "bias", "lora_E")
    weight, (A, B, rank) = layer._matrix(weight), layer._update()
    if not (_is_plain(weight) and _is_plain(A)):
        return None
    p = layer.dropout if layer.training else 0.0
    return (weight, bias, A, B, E), layer.scaling, p, rank


def _is_forward_alone(layer: nn.Module) -> bool:
    """Whether calling the layer is LoRALinear's forward: no hooks, no other in its place."""
    kind, own = type(layer), vars(layer)
    if kind.forward is not getattr(kind, "_grouped_forward", None):
        return False
    hooks = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        "forward" not in own
        and not any(own[name] for name in hooks)
        and all(hook in layer._own_hooks for hook in own["_forward_pre_hooks"].values())
    )


def _is_plain(tensor: Tensor) -> bool:
    kind = type(tensor)
    dense = tensor.layout is torch.strided and not tensor.is_nested
    return kind in (Tensor, nn.Parameter) and dense
