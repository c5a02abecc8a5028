"""A schedule's budget over a training, with its phases."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .._library import library
from ..allocator import Allocator
from ..config import AdaLoRAConfig
from ..spectral import SpectralConfig
from .look import COLORS, dress, grid, legend_below, new_figure

POINTS = 1000  # drawn at most
_ADAPTERS = 1000  # for a mean rank in thousandths


def budget_curve(
    source: AdaLoRAConfig | SpectralConfig | Allocator | Sequence,
    title: str = "Budget over the training",
) -> Figure:
    """What a schedule keeps after each step: warm-up, allocations, final phase.

    Args:
        source: a config, before training; an allocator, for the budget of its own model; or a
            history, which has no phases. An AdaLoRAConfig alone gives the mean rank, a
            SpectralConfig alone parameters, or per cent of its first ranks' cost.

    Raises:
        ValueError: a SpectralConfig's budget falls from what a model's first ranks cost, or a
            history is empty yet.
        TypeError: none of these.
    """
    if isinstance(source, (list, tuple)):
        if not source:
            raise ValueError("budget_curve: the history must have at least one event, got none")
        figure, [axes] = new_figure(2.6)
        _draw(axes, [event.step for event in source], [event.budget for event in source])
        dress(axes, title, "optimizer step", "budget")
        return figure
    config = source.config if isinstance(source, Allocator) else source
    if not isinstance(config, (AdaLoRAConfig, SpectralConfig)):
        raise TypeError(
            "budget_curve: source must be an AdaLoRAConfig, a SpectralConfig, an allocator or a "
            f"history, got {type(source).__name__}"
        )
    schedule = _schedule(source, config)
    budget, unit = _budget(source, config, schedule)
    freeze = config.total_steps - config.final_steps
    events = [step for step in range(config.warmup_steps, freeze + 1) if schedule.allocates(step)]
    events = [*events[:: -(-len(events) // POINTS)], events[-1]]
    figure, [axes] = new_figure(2.6)
    before = [] if getattr(config, "budget_at", None) else [0]
    steps = [*before, *events, config.total_steps]
    _draw(axes, steps, [budget(step) for step in [*before, *events, freeze]])
    _shade(axes, config, "pruning" if isinstance(config, AdaLoRAConfig) else "ranks move")
    dress(axes, title, "optimizer step", unit)
    axes.set_xlim(0, config.total_steps)
    legend_below(figure, axes)
    return figure


def _schedule(source, config):
    if isinstance(source, Allocator):
        return source.schedule
    if isinstance(config, AdaLoRAConfig):
        ranks = config.initial_rank, config.target_rank
        return library.BudgetSchedule(*(_ADAPTERS * r for r in ranks), config.allocation_options())
    if config.final_budget and not config.initial_budget:
        raise ValueError(
            "budget_curve: initial_budget must be given to draw a SpectralConfig alone, got 0, "
            "which is what the first ranks of a model cost; draw the SpectralAllocator"
        )
    first = config.initial_budget or 100
    steps = AdaLoRAConfig(
        total_steps=config.total_steps, warmup_steps=config.warmup_steps,
        final_steps=config.final_steps, allocation_interval=config.allocation_interval,
        target_modules="all-linear",
    )  # fmt: skip
    return library.BudgetSchedule(first, config.final_budget or first, steps.allocation_options())


def _budget(source, config, schedule) -> tuple[Callable[[int], float], str]:
    if isinstance(config, SpectralConfig):
        known = config.budget_at or config.initial_budget or isinstance(source, Allocator)
        unit = "parameters" if known else "% of the first ranks' cost"
        return config.budget_at or schedule.budget, unit
    if isinstance(source, Allocator):
        unit = "directions" if config.budget_unit == "triplets" else "parameters"
        return schedule.budget, f"{unit} kept"
    return lambda step: schedule.budget(step) / _ADAPTERS, "mean rank"


def _draw(axes: Axes, steps: Sequence[int], budgets: Sequence[float]) -> None:
    axes.plot(steps, budgets, color=COLORS[0], linewidth=2, drawstyle="steps-post")
    axes.set_ylim(0, 1.08 * max(*budgets, 1e-9))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,.0f}")
    axes.locator_params(nbins=7, integer=True)
    grid(axes)


def _shade(axes: Axes, config, middle: str) -> None:
    freeze = config.total_steps - config.final_steps
    phases = {
        "warm-up": (0, config.warmup_steps),
        middle: (config.warmup_steps, freeze),
        "final phase": (freeze, config.total_steps),
    }
    for (name, (start, end)), color in zip(phases.items(), COLORS[4:1:-1], strict=True):
        if end > start:
            label = f"{name}: steps {start + 1:,} to {end:,}"
            axes.axvspan(start, end, color=color, alpha=0.18, linewidth=0, label=label)
