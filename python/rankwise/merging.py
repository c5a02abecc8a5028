"""Merging an adapter into its base and back: one layer, and a whole model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import ops
from .computed import compute_anew, not_a_parameter, tensors_of
from .config import AdapterOptions
from .first_factors import FIRST, FirstFactors, with_first
from .installed import check_complete
from .sharding import check_unsharded, kind_without_memory, naming, reshard
from .tree import AdaptedLayer, Tree, required_layers
from .warned import warn


@dataclass(frozen=True)
class MergeReport:
    """One merge: how far rounding moved the weight, and how much of it changed at all.

    Args:
        max_rounding_error: largest |rounded - exact| over the weight's elements.
        changed: elements that differ from the base.
        total: elements.
    """

    max_rounding_error: float
    changed: int
    total: int

    def __str__(self) -> str:
        share = 100.0 * self.changed / max(self.total, 1)
        error = f"rounding error at most {self.max_rounding_error:.2g}"
        return f"{share:.1f} % of weights changed, {error}"


class Mergeable(AdaptedLayer):
    """Mixin of layers whose ``weight`` can give way to the base plus the active adapter's update.

    The base is never written: merging puts a new parameter in the place of ``weight`` and keeps the
    old object, so that unmerging restores every bit and tied weights are not touched.
    """

    weight: nn.Parameter
    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    lora_E: nn.Parameter | None
    lora_first: FirstFactors | None
    adapter: str | None
    options: AdapterOptions | None
    rank: int
    scaling: float

    def _become_mergeable(self, transposed: bool) -> None:
        """The state of a layer that is not merged. `transposed`: weight is stored [in, out]."""
        self.transposed = transposed
        self.adapters_enabled = True
        self._unmerged: tuple[nn.Parameter] | None = None
        self.in_merged_model = False  # set by merge(model): state_dict() leaves all adapters out

    @property
    def merged(self) -> bool:
        """Whether ``weight`` holds the base plus the active adapter's update."""
        return self._unmerged is not None

    def merge(self) -> MergeReport | None:
        """Puts round(W0 + scaling * B diag(E) A) in the place of ``weight``, less first factors.

        The sum is formed in float64 and rounded once. None (with a warning) when merged already.

        Raises:
            RuntimeError: no adapter is active, ``weight`` is computed by something (it is named,
                and how to undo it), or the sum is not finite; nothing is changed.
            ValueError: the weight or a factor is sharded; nothing is changed.
        """
        if self.merged:
            warn("merge: the layer is merged already; nothing was done")
            return None
        if self.adapter is None:
            raise RuntimeError("merge: no adapter is active")
        self.check_own_weight("merge")
        matrices = {name: getattr(self, name) for name in ("weight", "lora_A", "lora_B", "lora_E")}
        check_unsharded("merge", matrices, "merge the saved adapter into a model that is not")
        with torch.no_grad(), naming("merge", matrices):
            compute_anew(self)  # the factors too may be computed
            A, B, rank = self._update()
            merged, error, changed = ops.merged_weight(
                self._matrix(self.weight), A, B, self.lora_E, scaling=self.scaling, rank=rank
            )
            if kind_without_memory(merged) and not kind_without_memory(self.weight):
                raise RuntimeError(f"the weight would become {kind_without_memory(merged)}")
            report = MergeReport(error.item(), int(changed), merged.numel())
        if not math.isfinite(report.max_rounding_error):
            raise RuntimeError("merge: the merged weight would not be finite; nothing was changed")
        base = self.weight
        with all_or_none([self]):
            self.weight = nn.Parameter(self._matrix(merged), requires_grad=False)
            self._unmerged = (base,)
        return report

    def unmerge(self) -> None:
        """Puts the base parameter back, bit for bit; when not merged, only warns.

        Raises:
            RuntimeError: ``weight`` has come to be computed by something; nothing is changed.
        """
        if not self.merged:
            warn("unmerge: the layer is not merged; nothing was done")
            return
        self.check_own_weight("unmerge")
        with all_or_none([self]):
            (self.weight,) = self._unmerged
            self._unmerged, self.in_merged_model = None, False

    def check_own_weight(self, operation: str) -> None:
        """Raises RuntimeError unless ``weight`` is a parameter, which another can replace."""
        found = not_a_parameter(self, "weight")
        if found is not None:
            raise RuntimeError(f"{operation}: the layer's {found}; nothing was changed")

    def _update(self) -> tuple[Tensor, Tensor, int]:
        """A, B and rank of the active adapter's update, with its first factors."""
        A, B = tensors_of(self, "lora_A", "lora_B")
        return with_first(self._modules[FIRST], A, B, self.rank)

    def _matrix(self, weight: Tensor) -> Tensor:
        """weight as [out, in], without a copy; its own inverse."""
        return weight.t() if self.transposed else weight

    def _base_weight(self) -> nn.Parameter:
        return self._unmerged[0] if self.merged else self.weight

    def _weight_in_use(self) -> Tensor:
        return self.weight if self.adapters_enabled else self._base_weight()

    def _check_trainable(self) -> None:
        if self.merged and self.weight is self._unmerged[0]:
            raise RuntimeError(
                f"{type(self).__name__}: the base is back in the place of the merged weight, as "
                "FSDP puts its own parameters back; call unmerge(), and merge a model that is not "
                "sharded"
            )
        if self.merged and self.training and torch.is_grad_enabled() and self.lora_A.requires_grad:
            raise RuntimeError(
                f"{type(self).__name__}: a merged layer would train nothing; call unmerge() before "
                "training, or eval() or torch.no_grad() for inference"
            )

    def _apply(self, fn, recurse: bool = True):
        if not self.merged:
            return super()._apply(fn, recurse)
        self._parameters["unmerged"] = self._unmerged[0]  # so that the base goes with the rest
        try:
            return super()._apply(fn, recurse)
        finally:
            self._unmerged = (self._parameters.pop("unmerged"),)


@contextmanager
def all_or_none(layers: Iterable[Mergeable]) -> Iterator[None]:
    """Gives layers their weights and states of before when the block is left by an exception."""
    before = [(x, x._parameters.get("weight"), x._unmerged, x.in_merged_model) for x in layers]
    try:
        yield
    except BaseException:
        for layer, weight, unmerged, in_merged_model in before:
            if weight is not None:
                layer._parameters["weight"] = weight
            layer._unmerged, layer.in_merged_model = unmerged, in_merged_model
        raise


def merge(model: nn.Module) -> dict[str, MergeReport]:
    """Merges the active adapter into every layer's weight, all or none; {layer: report}.

    While merged, ``model.state_dict()`` is that of the plain model with merged weights. A model
    that is merged already is left alone, with a warning.

    Raises:
        RuntimeError: as a layer's merge(), with the layer's name; nothing is changed.
    """
    reports: dict[str, MergeReport] = {}
    reshard(model)
    check_complete("merge", Tree(model))
    every = required_layers(model)
    layers = {name: layer for name, layer in every.items() if layer.adapter is not None}
    if not layers:
        raise RuntimeError("merge: no adapter is active")
    layers = {name: layer for name, layer in layers.items() if not layer.merged}
    if not layers:
        warn("merge: the model is merged already; nothing was done")
        return reports
    check_own_weights("merge", layers)
    with all_or_none(every.values()):
        for name, layer in layers.items():
            reports[name] = _merge_layer(name, layer)
        for layer in every.values():
            layer.in_merged_model = True
    return reports


def check_own_weights(operation: str, layers: Mapping[str, Mergeable]) -> None:
    """Mergeable.check_own_weight() of all, by name."""
    for name, layer in layers.items():
        try:
            layer.check_own_weight(operation)
        except RuntimeError as error:
            raise RuntimeError(f"{name}: {error}") from None


def _merge_layer(name: str, layer: Mergeable) -> MergeReport:
    try:
        return layer.merge()
    except (RuntimeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


def unmerge(model: nn.Module) -> None:
    """Gives every merged layer its base back, bit for bit, all or none; with none, only warns.

    Raises:
        RuntimeError: as a layer's unmerge(), with the layer's name; nothing is changed.
    """
    every = required_layers(model)
    layers = {name: layer for name, layer in every.items() if layer.merged}
    if not layers:
        warn("unmerge: the model is not merged; nothing was done")
    check_own_weights("unmerge", layers)
    with all_or_none(every.values()):
        for layer in every.values():
            layer.in_merged_model = False
        for layer in layers.values():
            layer.unmerge()
