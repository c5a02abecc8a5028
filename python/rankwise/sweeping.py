"""Sweeps: which rank and learning rate, by cross-validation, going on where they were stopped."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import torch

from .config import LoRAConfig, _is_integer, _is_real, _require
from .sweep_results import SweepResults

Train = Callable[[LoRAConfig, float, list[int], list[int], int], float]


@dataclass(frozen=True)
class Scored:
    """A configuration at one learning rate.

    Args:
        rate: the learning rate.
        mean: of the validation scores of all folds and seeds.
        deviation: of them, the sample's; 0 of one alone.
    """

    rate: float
    mean: float
    deviation: float


@dataclass(frozen=True)
class Sweep:
    """What the trainings of a sweep gave.

    Args:
        configs: {name: configuration}.
        rows: a dict of each training that ended: name, rank, alpha, rate, fold, seed, score.
        failed: the same of each that did not, with its "error" in the place of "score".
        made: trainings of this call; the others were known.
    """

    configs: Mapping[str, LoRAConfig]
    rows: list[dict]
    failed: list[dict]
    made: int

    def scored(self, name: str) -> list[Scored]:
        """A configuration's rates with a score of every fold and seed, in rising order."""
        found: dict[float, list[float]] = {}
        for row in self.rows:
            if row["name"] == name:
                found.setdefault(row["rate"], []).append(row["score"])
        incomplete = {row["rate"] for row in self.failed if row["name"] == name}
        return [
            Scored(rate, mean(own), stdev(own) if len(own) > 1 else 0.0)
            for rate, own in sorted(found.items())
            if rate not in incomplete
        ]

    def best(self, name: str) -> Scored | None:
        """At the rate with the best mean, the lower of equal ones; None where none is complete."""
        return max(self.scored(name), key=lambda own: own.mean, default=None)


def sweep(
    train: Train,
    examples: int,
    configs: Mapping[str, LoRAConfig],
    rates: Sequence[float],
    *,
    folds: int = 5,
    seeds: int = 1,
    file: str | os.PathLike | None = None,
    task: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Sweep:
    """Trains every configuration at every rate on every fold, and tells how well each did.

    Folds are the same for all: a shuffle of the examples by a fixed seed, in parts that differ by
    one example at most. Each training is written to the file when it ends, so that a sweep that was
    stopped goes on; one that failed, by an exception or a score that is no finite number, is noted
    and made again by the next call.

    Args:
        train: of a configuration, a rate, indices to train on and to validate on, and a seed, by
            which torch is seeded before; returns a score, the higher the better.
        examples: how many there are, >= folds.
        configs: as rank_grid() makes them.
        rates: learning rates, > 0.
        folds: >= 2.
        seeds: trainings of each fold, with the seeds 0, 1, ...
        file: of results, a line each; None for memory alone.
        task: what else the score depends on, such as the program's version: outcomes of another
            task, configuration or number of examples or folds in the file do not count.
        progress: called with the trainings of this call that are done, and their number.
    """
    _check(examples, configs, rates, folds, seeds)
    results, parts = SweepResults(file), fold_indices(examples, folds)
    wanted = [
        {"name": name, "rank": config.rank, "alpha": config.alpha, "rate": float(rate)}
        | {"fold": fold, "seed": seed}
        for name, config in configs.items()
        for rate in rates
        for fold in range(folds)
        for seed in range(seeds)
    ]

    def setting(row: dict) -> dict:
        own = {key: value for key, value in row.items() if key != "name"}
        own |= {"config": repr(configs[row["name"]])}
        return {"task": task, "examples": examples, "folds": folds} | own

    missing = [row for row in wanted if "score" not in (results.get(setting(row)) or {})]
    report = progress or (lambda done, total: None)
    report(0, len(missing))
    for done, row in enumerate(missing, 1):
        outcome = _outcome(train, configs[row["name"]], row, *parts[row["fold"]])
        results.add(setting(row), outcome)
        report(done, len(missing))
    rows = [row | results.get(setting(row)) for row in wanted]
    return Sweep(
        dict(configs),
        [row for row in rows if "score" in row],
        [row for row in rows if "score" not in row],
        len(missing),
    )


def fold_indices(examples: int, folds: int) -> list[tuple[list[int], list[int]]]:
    """(to train on, to validate on) of each fold, rising."""
    order = list(range(examples))
    random.Random(0).shuffle(order)
    held = [set(order[fold::folds]) for fold in range(folds)]
    return [([i for i in range(examples) if i not in own], sorted(own)) for own in held]


def _outcome(
    train: Train, config: LoRAConfig, row: dict, training: list[int], validation: list[int]
) -> dict:
    torch.manual_seed(row["seed"])
    try:
        score = float(train(config, row["rate"], list(training), list(validation), row["seed"]))
    except Exception as error:  # of any kind: the other trainings go on
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    if not math.isfinite(score):
        return {"error": f"the score is {score}"}
    return {"score": score}


def _check(examples: int, configs: Mapping, rates: Sequence, folds: int, seeds: int) -> None:
    good = len(configs) > 0 and all(isinstance(own, LoRAConfig) for own in configs.values())
    _require(good, "sweep", "configs", "a dict of LoRAConfigs", configs)
    good = len(rates) > 0 and all(_is_real(rate) and 0 < rate < math.inf for rate in rates)
    _require(good, "sweep", "rates", "numbers > 0", rates)
    _require(len(set(rates)) == len(rates), "sweep", "rates", "different", rates)
    _require(_is_integer(folds) and folds >= 2, "sweep", "folds", "an integer >= 2", folds)
    _require(_is_integer(seeds) and seeds >= 1, "sweep", "seeds", "an integer >= 1", seeds)
    enough = _is_integer(examples) and examples >= folds
    _require(enough, "sweep", "examples", f"an integer >= {folds}, the folds", examples)
