"""EVA: adapters that begin with the directions in which a layer's inputs vary most."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .adapted import Adapted
from .config import AdapterOptions, _is_real, _require
from .first_values import (
    FirstAdapter,
    FirstAdapters,
    FirstValues,
    Layers,
    Options,
    call,
    check_at_once,
    in_eval,
    passes,
)
from .rank_budget import Room, best_directions
from .tree import Tree


@dataclass(frozen=True)
class EVA(FirstValues):
    """Explained variance adaptation (arXiv 2410.07170); it gives each matrix its first rank.

    Of the inputs x of each layer, over all rows of all batches, the covariance has eigenvectors v_i
    and eigenvalues l_i. The directions of all layers are put in one order by their share of their
    layer's variance, ``l_i / sum(l)``; the first ``sum(rank)`` of them become rows of A, at most
    ``rho * rank`` in a layer. B is zero: outputs do not change, and the base does not. Alpha
    becomes ``alpha * new rank / rank``, as in PEFT, so that without rslora every layer keeps its
    scaling. A layer that gets no direction gets no adapter, and with a SpectralConfig rank 0.

    The base runs in eval mode. Each layer of a pass holds ``8 * in^2`` bytes where it is.

    Args:
        batches: what the model is called with: mappings of named inputs, tuples of inputs, or one
            input each; on the model's device. In several processes all must have the same.
        rho: most of its rank that a layer can get, >= 1; 1 leaves ranks as they are.
        at_once: layers in one pass over the batches; None for all.

    Rows that a batch's ``attention_mask`` leaves out do not count, where it has the shape of the
    layer's input.
    """

    batches: Iterable
    rho: float = 2.0
    at_once: int | None = None

    _needs_weights = False

    def __post_init__(self) -> None:
        _require(_is_real(self.rho) and self.rho >= 1, "EVA", "rho", "at least 1", self.rho)
        check_at_once("EVA", self.at_once)

    def _find(self, tree: Tree, layers: Layers, options: Options) -> FirstAdapters:
        most = {path: self._most(layers[path], options[path]) for path in layers}
        shares: dict[str, Tensor] = {}
        directions: dict[str, Tensor] = {}
        for path, inputs in inputs_of("EVA", tree, list(layers), self.batches, self.at_once):
            inputs.check(path, most[path])
            shares[path], directions[path] = inputs.directions(most[path])
        ranks = _divided(shares, sum(own.rank_at_first for own in options.values()))
        return {
            path: FirstAdapter(_with_rank(options[path], rank), directions[path][:rank], None)
            for path, rank in ranks.items()
            if rank > 0 or options[path].capacity is not None
        }

    def _most(self, layer: Adapted, options: AdapterOptions) -> int:
        room = min(layer._sizes)
        if options.capacity is not None:
            room = min(room, options.capacity)
        return min(round(self.rho * options.rank_at_first), room)


def _with_rank(options: AdapterOptions, rank: int) -> AdapterOptions:
    if options.capacity is not None:  # an allocator's, with a scaling that no rank changes
        return replace(options, first_rank=rank)
    return replace(options, rank=rank, alpha=options.alpha * rank / options.rank)


def _divided(shares: Mapping[str, Tensor], total: int) -> dict[str, int]:
    """The ranks: how many of each layer's are among the `total` largest; ties by order."""
    rooms = {path: Room(1, 0, len(own)) for path, own in shares.items()}
    return best_directions({path: own.tolist() for path, own in shares.items()}, rooms, total)


class Inputs:
    """The covariance of one layer's inputs, summed batch by batch about the first one's mean."""

    def __init__(self, owner: str) -> None:
        self._owner, self.rows = owner, 0

    def add(self, rows: Tensor) -> None:
        if len(rows) == 0:
            return
        rows = rows.to(torch.float32 if rows.device.type == "mps" else torch.float64)
        if self.rows == 0:
            self._centre, self._sum, self._squares = rows.mean(0), 0.0, 0.0
        rows = rows - self._centre
        self._sum = self._sum + rows.sum(0)
        self._squares = self._squares + rows.t() @ rows
        self.rows += len(rows)

    def check(self, path: str, rank: int) -> None:
        if self.rows < max(rank, 1):
            raise ValueError(
                f"{self._owner}: {path!r} must see at least as many inputs as it can have "
                f"directions, {rank}, got {self.rows}; give more batches, or exclude it"
            )
        if not self._squares.isfinite().all():
            raise ValueError(
                f"{self._owner}: {path!r} must have finite inputs, got infinite values or NaN"
            )

    def directions(self, count: int) -> tuple[Tensor, Tensor]:
        """The largest shares of the variance [count], and their directions [count, in]."""
        covariance = self._squares - torch.outer(self._sum, self._sum) / self.rows
        values, vectors = torch.linalg.eigh(covariance)
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        total = values.sum()
        shares = values / total if total > 0 else values
        return shares[:count], vectors[:, :count].t()


def inputs_of(
    owner: str, tree: Tree, layers: list[str], batches: Iterable, at_once: int | None
) -> Iterator[tuple[str, Inputs]]:
    """Each layer and the covariance of its inputs over all batches, which it can then let go.

    Args:
        owner: in messages.
        layers, batches, at_once: see passes().
    """
    for names, own_batches in passes(owner, batches, layers, at_once):
        inputs = _one_pass(owner, tree, names, own_batches)
        for path in names:
            yield path, inputs.pop(path)


@torch.no_grad()
def _one_pass(owner: str, tree: Tree, names: list[str], batches: list) -> dict[str, Inputs]:
    inputs = {path: Inputs(owner) for path in names}
    mask: Tensor | None = None

    def hook(path: str):
        def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
            input = next(iter((*args, *kwargs.values()))).detach()
            if mask is not None and mask.shape == input.shape[:-1]:
                input = input[mask.to(input.device).bool()]
            inputs[path].add(input.reshape(-1, input.shape[-1]))

        return note

    handles = [
        tree.modules[path].register_forward_pre_hook(hook(path), with_kwargs=True) for path in names
    ]
    try:
        with in_eval(tree.model):
            for batch in batches:
                mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
                call(tree.model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return inputs
