"""What an adapter is: the options of one layer's adapter and the configuration for a model."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

INITS = (None, "kaiming", "gaussian", "swapped")


def _require(condition: bool, owner: str, name: str, wanted: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{owner}: {name} must be {wanted}, got {got!r}")


@dataclass(frozen=True)
class AdapterOptions:
    """One layer's adapter.

    Args:
        rank: directions used, >= 0.
        alpha: the update is scaled by alpha / rank, or alpha / sqrt(rank) with rslora
            (rsLoRA, arXiv 2312.03732); finite.
        dropout: probability in [0, 1] for the adapter's input, in training mode.
        rslora: see alpha.
        init: "kaiming" (A Kaiming-uniform as nn.Linear, B zero), "gaussian" (A normal with standard
            deviation 1 / rank, B zero) or "swapped" (A zero, B normal with 1 / rank); None for
            "kaiming" in linear layers and "swapped" in embeddings.
        capacity: directions allocated, >= rank; None for rank.
        adapter_dtype: of the factors: the base's (None), or float32 over a 16-bit base.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rslora: bool = False
    init: str | None = None
    capacity: int | None = None
    adapter_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        def require(condition: bool, name: str, wanted: str, got: object) -> None:
            _require(condition, "adapter", name, wanted, got)

        def is_integer(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        def is_finite(value: object) -> bool:
            return isinstance(value, (int, float)) and math.isfinite(value)

        require(is_integer(self.rank) and self.rank >= 0, "rank", "an integer >= 0", self.rank)
        require(is_finite(self.alpha), "alpha", "finite", self.alpha)
        probability = is_finite(self.dropout) and 0.0 <= self.dropout <= 1.0
        require(probability, "dropout", "in [0, 1]", self.dropout)
        require(self.init in INITS, "init", f"one of {INITS}", self.init)
        if self.capacity is not None:
            require(is_integer(self.capacity), "capacity", "an integer or None", self.capacity)
            enough = self.capacity >= self.rank
            require(enough, "capacity", f"at least the rank {self.rank}", self.capacity)

    @property
    def scaling(self) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rslora; 0 for rank 0."""
        if self.rank == 0:
            return 0.0
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True)
class LoRAConfig:
    """LoRA for a model (arXiv 2106.09685).

    Args:
        target_modules: names: a list of names or dotted suffixes, one regular expression that must
            match whole module names, or "all-linear" (every linear layer but the output layer).
        exclude_modules: the same forms, taken out again.
        rank, alpha, dropout, rslora, init, adapter_dtype: see AdapterOptions.
        rank_pattern, alpha_pattern: {name, suffix or regular expression: value} for modules that
            differ; the first match counts.
        modules_to_save: names or suffixes of modules trained and saved whole, such as a classifier.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: Sequence[str] | str = ()
    exclude_modules: Sequence[str] | str | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: Sequence[str] = ()
    rslora: bool = False
    init: str | None = None
    adapter_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        targets = self.target_modules
        names = isinstance(targets, str) or (
            isinstance(targets, Collection) and all(isinstance(name, str) for name in targets)
        )
        _require(
            names and len(targets) > 0,
            "LoRAConfig",
            "target_modules",
            'a list of names, a regular expression or "all-linear"',
            self.target_modules,
        )
        _require(
            not isinstance(self.modules_to_save, str),
            "LoRAConfig",
            "modules_to_save",
            "a list of names",
            self.modules_to_save,
        )
        self.options()

    def options(self, rank: int | None = None, alpha: float | None = None) -> AdapterOptions:
        """The options of one module, with its rank and alpha where a pattern gives them."""
        return AdapterOptions(
            rank=self.rank if rank is None else rank,
            alpha=self.alpha if alpha is None else alpha,
            dropout=self.dropout,
            rslora=self.rslora,
            init=self.init,
            adapter_dtype=self.adapter_dtype,
        )
