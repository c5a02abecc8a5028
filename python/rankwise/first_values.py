"""First ranks and first values of an adapter other than zero updates at random: what all have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .adapted import Adapted
from .config import AdapterOptions, _is_integer, _require
from .quantised import OverQuantised, keep_differentiable
from .sharding import ADD_BEFORE, check_unsharded, kind_without_memory
from .tree import Tree

Layers = Mapping[str, Adapted]
Options = Mapping[str, AdapterOptions]  # of their adapters
# {layer: what its adapter begins with}; a layer that is not there gets none.
FirstAdapters = dict[str, "FirstAdapter"]


@dataclass(frozen=True)
class FirstAdapter:
    """What an adapter begins with.

    Args:
        options: with the first rank.
        A: [rank, in].
        B: [out, rank], taken out of the base; None for zeros and the base as it is.
    """

    options: AdapterOptions
    A: Tensor
    B: Tensor | None


class FirstValues:
    """Base of what ``first_values=`` takes: PiSSA, OLoRA, LoRAGA and EVA.

    For the linear layers of a LoRAConfig or a SpectralConfig. The factors are computed in float32,
    float64 over a float64 base, and rounded to the adapter's dtype.
    """

    _needs_weights = True  # the base's values, and whole

    def find(self, tree: Tree, layers: Layers, options: Options) -> FirstAdapters:
        """The first values of every layer, of a model that is not changed.

        Args:
            tree: of the model.
            layers: its layers, or what will take their place.
            options: of their adapters.

        Raises:
            ValueError: a layer that these first values are not for, by name, with the way out.
        """
        for path, layer in layers.items():
            self._check(path, layer, options[path])
        return self._find(tree, layers, options)

    def _find(self, tree: Tree, layers: Layers, options: Options) -> FirstAdapters:
        raise NotImplementedError

    def _check(self, path: str, layer: Adapted, options: AdapterOptions) -> None:
        owner = f"{type(self).__name__}: {path!r}"
        if options.triplets:
            raise ValueError(f"{owner} has AdaLoRA's first values; use LoRAConfig, SpectralConfig")
        if isinstance(layer, nn.Embedding):
            raise ValueError(f"{owner} must be a linear layer, got an embedding; exclude it")
        if options.rank_at_first == 0 or options.scaling <= 0:
            raise ValueError(
                f"{owner} must begin with a rank and an alpha above 0, got rank "
                f"{options.rank_at_first} and alpha {options.alpha:g}; exclude it"
            )
        check_whole_weight(owner, layer)
        if self._needs_weights:
            check_exact_weight(owner, layer)


def check_whole_weight(owner: str, layer: Adapted) -> None:
    """Refuses a weight of which each process has a part."""
    weight = layer._base_weight()
    check_unsharded(owner, {"weight": weight}, ADD_BEFORE)


def check_exact_weight(owner: str, layer: Adapted) -> None:
    """Refuses a weight whose values are quantised, not loaded, or not finite."""
    if isinstance(layer, OverQuantised):
        raise ValueError(
            f"{owner} is quantised, and this needs exact values; take the dequantised model "
            "(transformers: model.dequantize()), or use EVA or input_variances"
        )
    weight = layer._base_weight()
    kind = kind_without_memory(weight)
    if kind:
        raise ValueError(f"{owner} must have its weight's values, got {kind}; load them first")
    if not weight.isfinite().all():
        raise ValueError(f"{owner} must have a finite weight, got infinite values or NaN")


def find_first(
    first_values: FirstValues | None,
    tree: Tree,
    layers: Layers,
    options: Options,
) -> FirstAdapters:
    """What first_values, checked, finds; nothing for None."""
    if first_values is None:
        return {}
    if not isinstance(first_values, FirstValues):
        raise TypeError(
            "first_values must be rw.PiSSA(), rw.OLoRA(), rw.LoRAGA(...), rw.EVA(...) or None, "
            f"got {first_values!r}"
        )
    return first_values.find(tree, layers, options)


def exact(matrix: Tensor) -> Tensor:
    """The values in the dtype in which factors are computed."""
    return matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))


def top_svd(
    matrix: Tensor, rank: int, iterations: int | None, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """U [out, rank], S [rank] and V^T [rank, in] of the largest singular values.

    Args:
        iterations: of the randomised SVD (Halko et al., arXiv 0909.4061); None for an exact one.
        seed: of the randomised one, whatever was drawn before.
    """
    if iterations is None:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return U[:, :rank], S[:rank], Vh[:rank]
    devices = [matrix.device] if matrix.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        U, S, V = torch.svd_lowrank(matrix, q=rank, niter=iterations)
    return U, S, V.t()


def call(model: nn.Module, batch) -> object:
    """What a model makes of a batch: a mapping of named inputs, several inputs, or one."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """Within the block nothing is dropped, and no statistics are collected."""
    keep_differentiable(model)  # 4-bit layers would change in eval mode, and lose digits
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


def check_at_once(owner: str, at_once: object) -> None:
    """Of passes()."""
    fits = at_once is None or (_is_integer(at_once) and at_once > 0)
    _require(fits, owner, "at_once", "an integer > 0 or None", at_once)


def passes(
    owner: str, batches: Iterable, layers: Sequence[str], at_once: int | None
) -> Iterator[tuple[list[str], list]]:
    """(layers, batches) of each pass over the data: all layers in one, or `at_once` in each."""
    batches = list(batches)
    if not batches:
        raise ValueError(f"{owner}: batches must have at least one batch, got none")
    names, size = list(layers), at_once or len(layers)
    for start in range(0, len(names), size):
        yield names[start : start + size], batches
