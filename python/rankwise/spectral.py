"""SpectralAllocator: ranks that fall and rise by the singular values of the updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from ._library import library
from .allocated import AllocatedAdapters
from .allocator import Allocator
from .config import AdapterOptions, TargetConfig, _is_integer, _is_real, _require
from .directions import Directions
from .process_group import DEFAULT
from .warned import warn

RankQuestion = library.RankQuestion
SCORES = ("normalised", "literal")
GROWTH = ("least", "mean", "gradient")
_INTEGERS = (
    "total_steps",
    "warmup_steps",
    "final_steps",
    "allocation_interval",
    "min_rank",
    "initial_budget",
    "final_budget",
    "kth_least",
    "probes",
    "ramp_steps",
    "seed",
)


@dataclass(frozen=True, kw_only=True)
class SpectralConfig(TargetConfig):
    """LoRA whose ranks move between matrices: what apply_lora() makes and SpectralAllocator moves.

    Args:
        initial_rank: of every adapter at the start, >= 0; at most its layer's smaller side. From 0
            all ranks come out of initial_budget.
        alpha: the update is scaled by alpha / initial_rank, or by alpha from rank 0, whatever its
            rank becomes.
        max_rank: of every adapter, for which there is room in its factors; None for twice the
            initial rank, or 8 from rank 0. At most the layer's smaller side.
        min_rank: directions that every adapter keeps; 0 from rank 0.
        total_steps: optimizer steps of the whole training, >= 1.
        warmup_steps: steps at the start that move nothing.
        final_steps: steps at the end that move nothing.
        allocation_interval: steps between two events.
        initial_budget, final_budget: in parameters, in + out for a direction of an [out, in] layer;
            between them it falls by the third power as AdaLoRA's. 0: what the first ranks cost, and
            the same at the end.
        budget_at: another budget, a function of the step. It must depend on that alone.
        score: of a direction with the singular value s and the averaged h = |dL/ds|: "normalised",
            s / mean(s) + sensitivity_weight * h / mean(h) with means over all directions, or
            "literal", s + sensitivity_weight * h.
        sensitivity_weight: see score.
        beta: decay of h's average over events, in [0, 1).
        threshold: directions whose score is lower are dropped.
        hysteresis: in [0, 1): a direction gives way to another matrix where its score is below
            1 - hysteresis of that one's weakest.
        max_moves: directions that an event may drop by choice, and add; None for as many as there
            are adapters.
        growth: which adapters gain first: those with the best "least" score, the best "mean" score,
            or the largest "gradient" that their directions do not see, as probes estimate it.
        kth_least: for "least": the k-th from below, or the best of adapters that have fewer.
        probes: directions by which each adapter looks, in the step of an event, at the gradient
            that its own do not see, where it has room: new ones begin with the largest part of
            that. 0: new ones are random. Layers' ranks count them from the step before an event
            to the event, the allocator's do not.
        min_age: steps before a choice may drop a new direction; None for two intervals.
        ramp_steps: steps over which the updates of a new direction grow to their full size.
        seed: of new directions, and of probes.
        rule: in the place of the rule above: a function of a RankQuestion (scores, young, costs,
            lowest, highest, unserved, former, ranks, budget, step) that returns the new ranks. It
            must depend on that alone.
        target_modules, exclude_modules, rank_pattern, alpha_pattern, modules_to_save, dropout,
            adapter_dtype: see TargetConfig.
    """

    initial_rank: int = 8
    alpha: float = 16.0
    max_rank: int | None = None
    min_rank: int = 1
    total_steps: int
    warmup_steps: int = 0
    final_steps: int = 0
    allocation_interval: int = 100
    initial_budget: int = 0
    final_budget: int = 0
    budget_at: Callable[[int], int] | None = None
    score: str = "normalised"
    sensitivity_weight: float = 0.1
    beta: float = 0.85
    threshold: float = 0.0
    hysteresis: float = 0.5
    max_moves: int | None = None
    growth: str = "least"
    kth_least: int = 1
    probes: int = 0
    min_age: int | None = None
    ramp_steps: int = 0
    seed: int = 0
    rule: Callable[[RankQuestion], Sequence[int]] | None = None

    def __post_init__(self) -> None:
        def require(condition: bool, name: str, wanted: str) -> None:
            _require(condition, "SpectralConfig", name, wanted, getattr(self, name))

        for name in (*_INTEGERS, "initial_rank"):
            require(_is_integer(getattr(self, name)), name, "an integer")
        for name in ("alpha", "sensitivity_weight", "beta", "threshold", "hysteresis"):
            require(_is_real(getattr(self, name)), name, "a number")
        for name in ("max_rank", "max_moves", "min_age"):
            value = getattr(self, name)
            require(value is None or _is_integer(value), name, "an integer or None")
        for name in ("budget_at", "rule"):
            value = getattr(self, name)
            require(value is None or callable(value), name, "a function or None")
        require(self.score in SCORES, "score", f"one of {SCORES}")
        require(self.growth in GROWTH, "growth", f"one of {GROWTH}")
        require(self.initial_rank >= 0, "initial_rank", "at least 0")
        least = max(self.initial_rank, 1)
        require(self.max_rank is None or self.max_rank >= least, "max_rank", f"at least {least}")
        require(self.min_rank <= self.initial_rank, "min_rank", f"at most {self.initial_rank}")
        self.allocation_options()
        super().__post_init__()

    def options(self, rank: int | None = None, alpha: float | None = None) -> AdapterOptions:
        rank = self.initial_rank if rank is None else rank
        return AdapterOptions(
            rank=max(rank, 1),
            first_rank=0 if rank == 0 else None,
            alpha=self.alpha if alpha is None else alpha,
            dropout=self.dropout,
            capacity=max(rank, self._room),
            adapter_dtype=self.adapter_dtype,
            within_layer=True,
        )

    @property
    def _room(self) -> int:
        return self.max_rank or 2 * self.initial_rank or 8

    def allocation_options(self):
        """The schedule for the C++ allocator, checked."""
        options = library.SpectralOptions()
        for name in set(_INTEGERS) - {"kth_least"}:
            getattr(options, name)(getattr(self, name))
        for name in ("sensitivity_weight", "beta"):
            getattr(options, name)(float(getattr(self, name)))
        options.max_rank(self._room)
        options.score(getattr(library.SpectralScore, self.score))
        options.min_age(-1 if self.min_age is None else self.min_age)
        exchange = library.ExchangeSettings()
        exchange.threshold, exchange.hysteresis = float(self.threshold), float(self.hysteresis)
        exchange.max_moves = -1 if self.max_moves is None else self.max_moves
        exchange.growth = getattr(library.GrowthOrder, self.growth)
        exchange.kth_least = self.kth_least
        options.exchange(exchange)
        if self.budget_at is not None:
            options.budget_at(self.budget_at)
        if self.rule is not None:
            options.rule(self.rule)
        options.check()
        return options


class SpectralAllocator(Allocator):
    """Moves ranks between a model's LoRA adapters at a conserved number of parameters.

    At events, every ``allocation_interval`` optimizer steps, it finds the singular directions of
    each update B A from its factors (QR and a small SVD, in float64 on the CPU), scores each by its
    singular value s and the moving average of ``|dL/ds|``, and decides how many directions each
    adapter gets. Where some go, the factors become ``B = U diag(s / a)``, ``A = diag(a) V^T`` of
    those that stay, a the lengths that rows of A had, with gradients and the optimizer's state in
    the new basis (averages of squares as far as a diagonal can tell). Where some come, B is zero
    and A orthonormal to the other rows, so that no output changes. ``sum(rank * (in + out)) +
    bank`` is the budget after every event. The layers stay plain LoRA; save_adapter() writes their
    ranks and alphas as patterns.

    A step with gradients that are infinite or NaN, and one that a fused optimizer left out under a
    GradScaler, changes nothing but ``skipped_steps``. Equal scores are decided by the order of
    layers and directions. On other devices than CPUs each step waits for the check of gradients.

    An adapter has one allocator at a time. Averages of a model (EMA, SWA) cannot follow: average
    after the last event. Copies and pickles belong to the copied layers, and are not attached.

    Args:
        model: with active LoRA adapters (``apply_lora(model, SpectralConfig(...))``).
        config: the schedule; its targets are not used here.
        group: the torch.distributed process group whose processes train this model together and
            must decide alike; "default" for the default one, where it has several processes; None
            for a process that trains on its own. Of a pipeline's stages or a tensor's parts, which
            have adapters of their own, give the group of those that have the same.

    Raises:
        ValueError: the model has no LoRA adapters, their factors are sharded in part or flattened,
            an option is wrong, a budget is below what the ranks need, or an adapter has an
            allocator that has made steps; one that has made none gives way to this.
    """

    def __init__(self, model: nn.Module, config: SpectralConfig, *, group=DEFAULT) -> None:
        if not isinstance(config, SpectralConfig):
            raise TypeError(
                f"SpectralAllocator: config must be a SpectralConfig, got {type(config).__name__}"
            )
        layers = self._layers_of(model, config, triplets=False)
        for layer in layers.values():
            if layer.directions is None:
                layer.directions = Directions(layer.capacity, layer.rank)
        self._take(config, AllocatedAdapters(type(self).__name__, layers), group)

    def _new_core(self, config: SpectralConfig, adapters: AllocatedAdapters):
        return library.SpectralAllocator(adapters.for_library(), config.allocation_options())

    def _reads(self) -> tuple[str, ...]:
        return () if self.frozen and self.config.ramp_steps == 0 else super()._reads()

    def _moves(self) -> int:
        return self._core.events

    def _changed(self) -> None:
        if self._adapters.averaged and not self._said_averaged:
            self._said_averaged = True
            warn(
                "SpectralAllocator: a copy of the model is an average of it (EMA, SWA), and ranks "
                "have moved: its factors are averages of different directions from now on. Begin "
                "the average anew after the last event"
            )

    _said_averaged = False

    @property
    def last_event(self):
        """The last of history; None before the first."""
        return self._core.last_event

    @property
    def bank(self) -> int:
        """What the present ranks leave of the budget."""
        return self._core.bank

    def __repr__(self) -> str:
        phase = "frozen" if self.frozen else f"budget {self.budget}, bank {self.bank}"
        return f"SpectralAllocator({len(self.ranks)} adapters, step {self.steps}, {phase})"
