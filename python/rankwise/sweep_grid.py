"""What a sweep compares: ranks, alphas and targets, at equal ranks or equal parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from .config import LoRAConfig, _is_integer, _is_real, _require
from .prepared import layers_of, plan
from .tree import Tree

Targets = Sequence[str] | str
OWNER = "rank_grid"


def rank_grid(
    config: LoRAConfig,
    ranks: Sequence[int],
    alpha: float | str = "2r",
    targets: Sequence[Targets] | None = None,
    equal_budget_of: nn.Module | None = None,
) -> dict[str, LoRAConfig]:
    """{name: configuration} for every set of targets and every rank, for rw.sweep().

    Args:
        config: what all have in common.
        ranks: different ones, > 0.
        alpha: a number, "r" or a multiple of it, such as "2r": then alpha / rank is the same.
        targets: values of target_modules; None for config's alone.
        equal_budget_of: a model; other sets than the first get the largest rank whose parameters
            are at most the first's. None: all sets have the same rank.

    Raises:
        ValueError: an argument is wrong, or one rank of a set costs more than the first may.
    """
    _require(isinstance(config, LoRAConfig), OWNER, "config", "a LoRAConfig", config)
    good = len(ranks) > 0 and all(_is_integer(rank) and rank > 0 for rank in ranks)
    _require(
        good and len(set(ranks)) == len(ranks), OWNER, "ranks", "different integers > 0", ranks
    )
    sets = [config.target_modules] if targets is None else list(targets)
    _require(len(sets) > 0, OWNER, "targets", "at least one set of modules", targets)
    found = {}
    for rank in ranks:
        limit = None
        for own in sets:
            base, given = replace(config, target_modules=own), rank
            if equal_budget_of is not None:
                cost = adapter_parameters(equal_budget_of, replace(base, rank=1))
                limit = limit or rank * cost
                given = limit // cost
                wanted = f"at least {cost:,}, what one rank of {text_of(own)} costs"
                _require(given > 0, OWNER, f"parameters of rank {rank}", wanted, limit)
            name = f"r={rank}" if len(sets) == 1 else f"{text_of(own)} r={given}"
            found[name] = replace(base, rank=given, alpha=alpha_of(alpha, given))
    return found


def alpha_of(alpha: float | str, rank: int) -> float:
    """A number, or "r", "2r", "0.5r" for a multiple of the rank."""
    try:
        if isinstance(alpha, str):
            factor = alpha[:-1] if alpha.endswith("r") else alpha
            value = float(factor or 1)
            return value * rank if alpha.endswith("r") else value
        if _is_real(alpha):
            return float(alpha)
    except ValueError:
        pass
    raise ValueError(f'{OWNER}: alpha must be a number, "r" or a multiple as "2r", got {alpha!r}')


def adapter_parameters(model: nn.Module, config: LoRAConfig) -> int:
    """How many parameters the adapters of a configuration have; the model is not changed."""
    tree = Tree(model)
    options, _ = plan(tree, config)
    layers = layers_of(tree, options)
    return sum(options[path].rank * sum(layer._sizes) for path, layer in layers.items())


def text_of(targets: Targets) -> str:
    """As on the command line."""
    return targets if isinstance(targets, str) else ",".join(targets)
