"""What an adapter is: the options of one layer's adapter and the configuration for a model."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ._library import library

BUDGET_UNITS = ("triplets", "parameters")
INITS = (None, "kaiming", "gaussian", "swapped")
NARROW = (torch.bfloat16, torch.float16)

# What AdaLoRAConfig has of a schedule under the same name; the budget's unit is a word there.
_SCHEDULE = (
    "target_rank",
    "total_steps",
    "warmup_steps",
    "final_steps",
    "allocation_interval",
    "beta1",
    "beta2",
    "min_rank",
    "shrink",
)


def _require(condition: bool, owner: str, name: str, wanted: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{owner}: {name} must be {wanted}, got {got!r}")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def factor_dtypes(base: torch.dtype) -> tuple[torch.dtype, ...]:
    """Which dtypes factors can have over a base of this one, the default first."""
    if base == torch.float64 or base == torch.float32:
        return (base,)
    return (torch.float32, base) if base in NARROW else (torch.float32, *NARROW)  # quantised


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
        adapter_dtype: of the factors: None for float32 over a 16-bit base and the base's dtype over
            others; the base's 16-bit dtype on request, in which optimizers lose small updates.
        triplets: with the factor lora_E, as AdaLoRA: A and B start normal with standard deviation
            0.02, E zero, as in the paper's code; ``init`` is not used.
        allocation: AdaLoRA's schedule where a configuration or a folder gave it; it goes into saved
            folders.
        task_type: PEFT's name of the task, where a folder gave it; it goes into saved folders.
        first_rank: directions in use at first, where an allocator changes how many there are; None
            for rank.
        within_layer: take no more directions than the layer's smaller side has; see within().
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rslora: bool = False
    init: str | None = None
    capacity: int | None = None
    adapter_dtype: torch.dtype | None = None
    triplets: bool = False
    allocation: library.AllocationSettings | None = None
    task_type: str = ""
    first_rank: int | None = None
    within_layer: bool = False

    def __post_init__(self) -> None:
        def require(condition: bool, name: str, wanted: str, got: object) -> None:
            _require(condition, "adapter", name, wanted, got)

        def is_finite(value: object) -> bool:
            return _is_real(value) and math.isfinite(value)

        require(_is_integer(self.rank) and self.rank >= 0, "rank", "an integer >= 0", self.rank)
        require(is_finite(self.alpha), "alpha", "finite", self.alpha)
        probability = is_finite(self.dropout) and 0.0 <= self.dropout <= 1.0
        require(probability, "dropout", "in [0, 1]", self.dropout)
        require(self.init in INITS, "init", f"one of {INITS}", self.init)
        if self.capacity is not None:
            require(_is_integer(self.capacity), "capacity", "an integer or None", self.capacity)
            enough = self.capacity >= self.rank
            require(enough, "capacity", f"at least the rank {self.rank}", self.capacity)

    @property
    def scaling(self) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rslora; 0 for rank 0."""
        if self.rank == 0:
            return 0.0
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def rank_at_first(self) -> int:
        """Directions in use at first."""
        return self.rank if self.first_rank is None else self.first_rank

    def within(self, side: int) -> AdapterOptions:
        """The same with at most `side` directions, and the scaling that it had."""
        capacity = self.rank if self.capacity is None else self.capacity
        if capacity <= side:
            return self
        rank = min(self.rank, side)
        ratio = rank / self.rank if self.rank else 1.0
        alpha = self.alpha * (math.sqrt(ratio) if self.rslora else ratio)
        return replace(self, rank=rank, alpha=alpha, capacity=min(capacity, side))

    def dtype_over(self, base: torch.dtype) -> torch.dtype:
        """The factors' dtype over a base of this one."""
        return self.adapter_dtype or factor_dtypes(base)[0]


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """Which modules of a model are adapted or trained whole.

    Args:
        target_modules: names: a list of names or dotted suffixes, one regular expression that must
            match whole module names, or "all-linear" (every linear layer but the output layer).
        exclude_modules: the same forms, taken out again.
        rank_pattern, alpha_pattern: {name, suffix or regular expression: value} for modules whose
            (initial) rank or alpha differ; the first match counts.
        modules_to_save: names or suffixes of modules trained and saved whole, such as a classifier.
        dropout: see AdapterOptions.
        adapter_dtype: see AdapterOptions. Modules trained whole have their base's dtype, or float32
            where that is asked for.
    """

    target_modules: Sequence[str] | str = ()
    exclude_modules: Sequence[str] | str | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: Sequence[str] = ()
    dropout: float = 0.0
    adapter_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        def is_names(value: object) -> bool:
            return isinstance(value, Collection) and all(isinstance(name, str) for name in value)

        owner, targets, whole = type(self).__name__, self.target_modules, self.modules_to_save
        wanted = 'a list of names, a regular expression or "all-linear"'
        _require(is_names(targets) and len(targets) > 0, owner, "target_modules", wanted, targets)
        names = is_names(whole) and not isinstance(whole, str)
        _require(names, owner, "modules_to_save", "a list of names", whole)
        self.options()

    def options(self, rank: int | None = None, alpha: float | None = None) -> AdapterOptions:
        """The options of one module, with its rank and alpha where a pattern gives them."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(TargetConfig):
    """LoRA for a model (arXiv 2106.09685).

    Args:
        rank, alpha, rslora, init: see AdapterOptions.
        target_modules, exclude_modules, rank_pattern, alpha_pattern, modules_to_save, dropout,
            adapter_dtype: see TargetConfig.
    """

    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False
    init: str | None = None

    def options(self, rank: int | None = None, alpha: float | None = None) -> AdapterOptions:
        return AdapterOptions(
            rank=self.rank if rank is None else rank,
            alpha=self.alpha if alpha is None else alpha,
            dropout=self.dropout,
            rslora=self.rslora,
            init=self.init,
            adapter_dtype=self.adapter_dtype,
        )


@dataclass(frozen=True, kw_only=True)
class AdaLoRAConfig(TargetConfig):
    """AdaLoRA for a model (arXiv 2303.10512): what apply_lora() makes and RankAllocator prunes.

    Args:
        initial_rank: of every adapter at the start, >= 1.
        target_rank: the mean rank at the end, 0 .. initial_rank.
        alpha: the update is scaled by alpha / initial_rank, also after pruning.
        total_steps: optimizer steps of the whole training, >= 1.
        warmup_steps: steps at the start that prune nothing.
        final_steps: steps at the end with the pattern frozen and the adapters shrunk.
        allocation_interval: steps between two allocations.
        beta1, beta2: decay of the averages of sensitivity and uncertainty, in [0, 1).
        budget_unit: "triplets" as in the paper, or "parameters" (a triplet of an [out, in] layer
            costs in + out).
        min_rank: directions that every adapter keeps.
        shrink: move the kept directions to the front when the pattern is frozen, so that later
            steps compute and store them alone; False masks only.
        target_modules, exclude_modules, rank_pattern, alpha_pattern, modules_to_save, dropout,
            adapter_dtype: see TargetConfig. Only linear layers can be targets.
    """

    initial_rank: int = 12
    target_rank: int = 8
    alpha: float = 24.0
    total_steps: int
    warmup_steps: int = 0
    final_steps: int = 0
    allocation_interval: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    budget_unit: str = "triplets"
    min_rank: int = 0
    shrink: bool = True

    def __post_init__(self) -> None:
        integers = ("initial_rank", "target_rank", "total_steps", "warmup_steps", "final_steps")
        for name in (*integers, "allocation_interval", "min_rank"):
            value = getattr(self, name)
            _require(_is_integer(value), "AdaLoRAConfig", name, "an integer", value)
        for name in ("alpha", "beta1", "beta2"):
            value = getattr(self, name)
            _require(_is_real(value), "AdaLoRAConfig", name, "a number", value)
        _require(isinstance(self.shrink, bool), "AdaLoRAConfig", "shrink", "a bool", self.shrink)
        self.allocation_options()
        super().__post_init__()

    def options(self, rank: int | None = None, alpha: float | None = None) -> AdapterOptions:
        return AdapterOptions(
            rank=self.initial_rank if rank is None else rank,
            alpha=self.alpha if alpha is None else alpha,
            dropout=self.dropout,
            adapter_dtype=self.adapter_dtype,
            triplets=True,
            allocation=self.allocation_settings(),
        )

    @classmethod
    def from_settings(cls, settings: library.AllocationSettings, **others) -> AdaLoRAConfig:
        """The configuration with an adapter's schedule; `others` are all but the schedule."""
        schedule = {name: getattr(settings, name) for name in _SCHEDULE}
        return cls(budget_unit=settings.budget_unit.name, **schedule, **others)

    def allocation_settings(self) -> library.AllocationSettings:
        """The schedule as adapters keep it."""
        settings = library.AllocationSettings()
        for name in _SCHEDULE:
            setattr(settings, name, getattr(self, name))
        settings.budget_unit = getattr(library.BudgetUnit, self.budget_unit)
        return settings

    def allocation_options(self):
        """The schedule for the C++ allocator, checked."""
        unit = self.budget_unit
        known = unit in BUDGET_UNITS
        _require(known, "AdaLoRAConfig", "budget_unit", f"one of {BUDGET_UNITS}", unit)
        options = library.AdaLoRAOptions(self.initial_rank, self.allocation_settings())
        options.check()
        return options
