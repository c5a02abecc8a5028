"""What speaks for ranks: a trained adapter, an allocator, gradients or inputs of a few batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ..adapted import Adapted
from ..allocator import Allocator
from ..config import TargetConfig, _is_integer, _require
from ..first_gradients import gradients_of
from ..first_inputs import inputs_of
from ..first_values import check_at_once, check_exact_weight, check_whole_weight, passes
from ..model import disable_adapters
from ..prepared import layers_of, plan
from ..tree import Tree
from .scores import DirectionScores, MatrixScores
from .subspaces import delta_spectrum
from .updates import sizes_of, updates


def update_energies(source: str | os.PathLike | nn.Module) -> DirectionScores:
    """The squared singular values of a trained adapter's updates.

    Ranks by them are those of the truncation, of all matrices together, that loses least of
    ``sum ||dW||_F^2``, exactly where all matrices cost the same, else but for one direction. Costs
    one training at a rank to choose from, which is also the most a matrix can get.

    Args:
        source: a PEFT folder, or a model with adapters.
    """
    found = updates(source)
    scores = {m: delta_spectrum(update).S.square().tolist() for m, update in found.items()}
    return DirectionScores(scores, sizes_of(found), "energy")


def allocated_ranks(allocator: Allocator, events: int = 1) -> MatrixScores:
    """The ranks that an allocator gave, on average over its last events.

    Costs nothing beside the training that it was part of.

    Args:
        allocator: a RankAllocator or a SpectralAllocator, also one whose state was loaded.
        events: >= 1; fewer where there were fewer, and the present ranks where there were none.
    """
    fits = _is_integer(events) and events >= 1
    _require(fits, "allocated_ranks", "events", "an integer >= 1", events)
    if not isinstance(allocator, Allocator):
        raise TypeError(
            "allocated_ranks: allocator must be a RankAllocator or a SpectralAllocator, got "
            f"{type(allocator).__name__}"
        )
    modules = list(allocator.ranks)
    last = [event.ranks for event in allocator.history[-events:]]
    last = last or [list(allocator.ranks.values())]
    means = (sum(own) / len(last) for own in zip(*last, strict=True))
    return MatrixScores(dict(zip(modules, means, strict=True)), allocator.sizes, "rank given")


def squared_gradients(
    model: nn.Module,
    config: TargetConfig,
    batches: Iterable,
    loss: Callable[[nn.Module, object], Tensor],
    at_once: int | None = None,
) -> MatrixScores:
    """The mean square of dL/dW of each matrix, over its elements and over batches.

    The empirical Fisher diagonal's mean, but of batches in the place of single examples: the
    smaller they are, the nearer. The base runs in eval mode, no ``.grad`` is written, and nothing
    of the model changes. Costs forward and backward of all batches, once or, with at_once, several
    times; a pass holds the gradients of its matrices twice in the dtype of the weights.

    Args:
        model: before apply_lora; adapters that are there are switched off meanwhile.
        config: its targets are used.
        batches: a few, of any kind, in one list.
        loss: a function of the model and a batch that returns a scalar.
        at_once: matrices in one pass over the batches; None for all.

    Raises:
        ValueError: a weight is quantised, sharded or not finite, or gets no finite gradient.
    """
    owner = "squared_gradients"
    check_at_once(owner, at_once)
    tree, layers = _targets(model, config)
    for path, layer in layers.items():
        check_whole_weight(f"{owner}: {path!r}", layer)
        check_exact_weight(f"{owner}: {path!r}", layer)
    scores = dict.fromkeys(layers, 0.0)
    with disable_adapters(model) if tree.adapted else nullcontext():
        for names, own_batches in passes(owner, batches, list(layers), at_once):
            weights = {path: layers[path]._base_weight() for path in names}
            for gradients in gradients_of(owner, tree.model, weights, own_batches, loss):
                for path, gradient in gradients.items():
                    wide = torch.promote_types(gradient.dtype, torch.float32)
                    norm = torch.linalg.vector_norm(gradient, dtype=wide).item()
                    scores[path] += norm**2 / gradient.numel() / len(own_batches)
    return MatrixScores(scores, _layer_sizes(layers), "mean squared gradient")


def input_variances(
    model: nn.Module,
    config: TargetConfig,
    batches: Iterable,
    most: int = 64,
    at_once: int | None = None,
) -> DirectionScores:
    """The shares of its inputs' variance along each matrix's principal directions, as in EVA.

    EVA (arXiv 2410.07170) orders them so, too, but counts directions where a budget counts
    parameters. The base runs in eval mode. Costs a forward pass of all batches, ``8 * in^2`` bytes
    for each matrix of a pass, and an eigenvalue problem of [in, in].

    Args:
        model: before apply_lora; adapters that are there are switched off meanwhile.
        config: its targets are used; linear layers.
        batches: what the model is called with, as for EVA.
        most: directions of a matrix that are looked at, and that it can get.
        at_once: matrices in one pass over the batches; None for all.

    Raises:
        ValueError: a matrix sees fewer inputs than directions, infinite ones or NaN, or is an
            embedding or sharded.
    """
    owner = "input_variances"
    _require(_is_integer(most) and most > 0, owner, "most", "an integer > 0", most)
    check_at_once(owner, at_once)
    tree, layers = _targets(model, config)
    for path, layer in layers.items():
        check_whole_weight(f"{owner}: {path!r}", layer)
        if isinstance(layer, nn.Embedding):
            raise ValueError(
                f"{owner}: {path!r} must be a linear layer, got an embedding; exclude it"
            )
    scores = {}
    with disable_adapters(model) if tree.adapted else nullcontext():
        for path, inputs in inputs_of(owner, tree, list(layers), batches, at_once):
            count = min(most, *layers[path]._sizes)
            inputs.check(path, count)
            scores[path] = inputs.directions(count)[0].tolist()
    return DirectionScores(scores, _layer_sizes(layers), "variance explained")


def _targets(model: nn.Module, config: TargetConfig) -> tuple[Tree, dict[str, Adapted]]:
    tree = Tree(model)
    return tree, layers_of(tree, plan(tree, config)[0])


def _layer_sizes(layers: Mapping[str, Adapted]) -> dict[str, tuple[int, int]]:
    """{path: (out, in)}"""
    return {path: layer._sizes[::-1] for path, layer in layers.items()}
