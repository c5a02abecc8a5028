"""What "all-linear" leaves out: weights that are no layers of their own, such as fused experts."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping

from torch import Tensor, nn

from .nn import is_adaptable
from .tree import AdaptedLayer, Tree
from .warned import warn

# Layers that nobody takes for linear ones: tables, filters and scales.
_NOT_LINEAR = (
    nn.modules.conv._ConvNd,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LayerNorm,
    nn.RMSNorm,
)
# Those whose matrices are known to be products'; of other modules a matrix may be a table.
_PRODUCTS = (nn.MultiheadAttention, nn.RNNBase, nn.Linear)
_LEAST_SHARE = 0.05  # of the weights that could have adapters


def warn_of_left_out(
    tree: Tree, targets: Iterable[nn.Module], known: Collection[nn.Module]
) -> None:
    """Names weights that "all-linear" means and that no adapter reaches, alike modules as one.

    Args:
        targets: layers that get an adapter.
        known: modules that the configuration excludes or trains whole.
    """
    groups = _groups(tree, known)
    left = {pattern: _count(weights.values()) for pattern, weights in groups.items()}
    candidates = sum(left.values()) + _count(module.weight for module in targets)
    lines = [
        _line(pattern, groups[pattern], count / _count(tree.model.parameters()))
        for pattern, count in left.items()
        if count >= _LEAST_SHARE * candidates
    ]
    if lines:
        warn(
            '"all-linear" adapts linear layers; these weights get no adapter (percent of the '
            "model's parameters): " + "; ".join(lines)
        )


def _groups(tree: Tree, known: Collection[nn.Module]) -> dict[str, dict[str, Tensor]]:
    """{module's name, its numbers as *: {parameter's name: the weight}}"""
    groups: dict[str, dict[str, Tensor]] = {}
    inside = None
    for module, (path, *_) in tree.names.items():
        if inside is not None and path.startswith(inside):
            continue
        layer = isinstance(module, (*_NOT_LINEAR, AdaptedLayer)) or is_adaptable(module)
        if layer or module in known:
            inside = f"{path}."
            continue
        owner, _, parametrised = path.partition(".parametrizations.")
        products = isinstance(tree.modules[owner], _PRODUCTS) or "expert" in owner
        group = groups.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", owner), {})
        for name, weight in _weights(module, least_dim=2 if products else 3):
            group[f"{path}.{parametrised or name}"] = weight
    return {pattern: weights for pattern, weights in groups.items() if weights}


def _weights(module: nn.Module, least_dim: int) -> Iterator[tuple[str, Tensor]]:
    """Matrices and stacks of them. What has a first dimension of 1 stands for an input."""
    for name, parameter in module.named_parameters(recurse=False):
        weight = parameter.is_floating_point() and "bias" not in name
        if weight and parameter.dim() >= least_dim:
            if 1 not in (parameter.shape[0], *parameter.shape[-2:]):
                yield name, parameter


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _line(pattern: str, weights: Mapping[str, Tensor], share: float) -> str:
    names = {key.rpartition(".")[2]: weight.dim() for key, weight in weights.items()}
    dims = "/".join(f"{dim}-D" for dim in sorted(set(names.values())))
    return f"{pattern or 'the model'}: {dims} parameters {', '.join(names)}, {share:.0%}"
