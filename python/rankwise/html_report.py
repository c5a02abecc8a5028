"""write_report(): an adapter, or the training that made it, on one page of HTML."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from torch import nn

from .allocator import Allocator
from .analysis import Update, delta_spectrum, effective_ranks, updates
from .analysis.updates import read, tensors_of, updates_in
from .config import AdaLoRAConfig
from .folder_amplification import amplifications
from .html_page import facts, page, paragraph, picture, section, table
from .rank_history import FILE, RankHistory

OPEN = 40  # rows at most of a table that is unfolded
COLUMNS = ("module", "out x in", "rank", "scaling", "norm", "entropy", "stable", "90 %", "95 %",
           "99 %", "health")  # fmt: skip


def write_report(
    path: str | os.PathLike,
    source: str | os.PathLike | nn.Module,
    history: Allocator | RankHistory | str | os.PathLike | None = None,
    model: str | os.PathLike | None = None,
    title: str | None = None,
) -> None:
    """Writes one HTML file that needs nothing else: numbers, pictures, health.

    A summary, ranks by layer and projection, singular values and effective ranks of all updates,
    and of a training that moved ranks those over its steps and the budget. It has no script and
    asks for nothing from elsewhere; it is made for wide and narrow screens, light and dark.

    Args:
        path: of the file to write.
        source: a PEFT folder, of LoRA or AdaLoRA, or a model with adapters, for its active one.
        history: the allocator, its RankHistory or a file of that; None for ``rank_history.json`` in
            the folder, if it is there.
        model: the folder of the base model, for what a folder's adapter amplifies of its weights.
        title: of the page.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        FileError: a folder cannot be read.
        ValueError: the history's file is no such, or a model folder was given for a model.
    """
    from . import plots

    if isinstance(source, nn.Module) and model is not None:
        raise ValueError("write_report: model is for a source that is a folder, got a model too")
    if isinstance(source, (str, os.PathLike)):
        file = read("write_report", "source", source)
        name, config, found = Path(source).resolve().name, file.config, updates_in(file)
    else:
        name, config, found = type(source).__name__, None, updates(source)
    modules = {module: _module(update) for module, update in found.items()}
    parts = [facts(_summary(found, modules, config))]
    if found:
        ranks = {module: update.rank for module, update in found.items()}
        parts.append(section("Ranks", picture(plots.rank_map(ranks), RANKS)))
    parts += _training(_history(source, history), history, config)
    sound = {module: found[module] for module, own in modules.items() if own["norm"] is not None}
    if sound:
        parts.append(section("Singular values", picture(plots.spectra(sound), SPECTRA)))
    if model is not None:
        drawn = plots.amplification(amplifications(source, model))
        parts.append(section("Amplification", picture(drawn, AMPLIFICATION)))
    rows = ([module, *map(_text, own.values())] for module, own in modules.items())
    parts.append(section("Modules", paragraph(EFFECTIVE), table(COLUMNS, rows, len(found) <= OPEN)))
    written = page(title or f"Adapter {name}", *parts)
    Path(path).write_text(written, encoding="utf-8", errors="xmlcharrefreplace")


RANKS = "How many directions each module's update has."
OVER_TIME = "The ranks that each allocation left."
BUDGET = "What all modules together may keep: {}."
SCHEDULE = "AdaLoRA's schedule: how many directions a module may keep on average."
SPECTRA = (
    "How large each direction of the update ΔW is. Where the values fall steeply a lower rank "
    "would do; where they end level at the rank, a higher one may be worth a try."
)
AMPLIFICATION = (
    "The update's norm against that of W along the same directions: where the bar of its own "
    "directions is long, the update brings forward what is there in W, but weak. W's first "
    "directions and random ones are to compare with."
)
EFFECTIVE = (
    "Effective ranks: entropy exp(-sum p log p) of the singular values, stable sum s²/max s², and "
    "how many directions have 90, 95 and 99 % of the energy."
)


def _summary(found: Mapping[str, Update], modules: Mapping[str, dict], config) -> dict:
    factors = [tensor for update in found.values() for tensor in tensors_of(update)]
    ranks = [update.rank for update in found.values()] or [0]
    triplets = any(update.lora_E is not None for update in found.values())
    unsound = [name for name, own in modules.items() if own["health"] == "not finite"]
    zero = sum(own["norm"] == 0 for own in modules.values())
    health = [f"not finite: {', '.join(unsound)}"] if unsound else []
    health += [f"{zero} of {len(modules)} modules add nothing"] if zero else []
    return {
        "method": config.peft_type if config else "AdaLoRA" if triplets else "LoRA",
        "base model": (config.base_model_name_or_path or None) if config else None,
        "modules": f"{len(found):,}",
        "ranks": f"{min(ranks)} to {max(ranks)}, mean {sum(ranks) / len(ranks):.2f}",
        "alpha": f"{config.alpha:g}" if config else None,
        "parameters": f"{sum(t.numel() for t in factors):,}",
        "size": f"{sum(t.numel() * t.element_size() for t in factors) / 2**20:.2f} MiB",
        "dtypes": ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in factors})),
        "health": "; ".join(health) or "ok",
    }


def _module(update: Update) -> dict:
    """The columns of a module, None where its values are not finite."""
    factors = tensors_of(update)
    finite = all(bool(t.isfinite().all()) for t in factors)
    own = {"shape": f"{update.lora_B.shape[0]} x {update.lora_A.shape[1]}", "rank": update.rank,
           "scaling": update.scaling, "norm": None}  # fmt: skip
    if not finite:
        nothing = dict.fromkeys(("entropy", "stable", "energy_90", "energy_95", "energy_99"))
        return own | nothing | {"health": "not finite"}
    spectrum = delta_spectrum(update).S
    own["norm"] = spectrum.norm().item()
    health = "ok" if own["norm"] else "adds nothing"
    return own | asdict(effective_ranks(spectrum)) | {"health": health}


def _text(value: object) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _history(source, given) -> RankHistory | None:
    if isinstance(given, Allocator):
        return RankHistory.of(given)
    if isinstance(given, (RankHistory, type(None))):
        beside = None if isinstance(source, nn.Module) else Path(source) / FILE
        return given or (RankHistory.load(beside) if beside and beside.is_file() else None)
    return RankHistory.load(given)


def _training(history: RankHistory | None, given, config) -> list[str]:
    """Ranks and budget over the steps; the schedule's budget where those are not known."""
    from . import plots

    events = list(history.events) if history else []
    pictures = []
    if events:
        pictures.append(picture(plots.ranks_over_time(events, history.names), OVER_TIME))
        budget = plots.budget_curve(given if isinstance(given, Allocator) else events)
        pictures.append(picture(budget, BUDGET.format(history.unit)))
    elif schedule := _schedule(config):
        pictures.append(picture(plots.budget_curve(schedule), SCHEDULE))
    return [section("Training", *pictures)] if pictures else []


def _schedule(config) -> AdaLoRAConfig | None:
    """An AdaLoRA folder's; None where it has none, or one that cannot be."""
    if config is None or config.allocation is None:
        return None
    try:
        return AdaLoRAConfig.from_settings(
            config.allocation, initial_rank=config.rank, target_modules="all-linear"
        )
    except ValueError:
        return None
