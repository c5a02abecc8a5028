"""Advice on ranks: of each matrix, from evidence, within a budget of parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..config import _is_integer, _is_real, _require
from ..rank_budget import Room, Rooms, cost_of
from .scores import DirectionScores, MatrixScores

OWNER = "rank_advice"


@dataclass(frozen=True)
class RankAdvice:
    """Ranks, and where they come from.

    Args:
        ranks: {module: rank}.
        scores: {module: its score}, or its directions' sum of scores.
        meaning: of a score.
        sizes: {module: (out, in)}.
        budget: in parameters; what was asked for.
        spent: what the ranks cost, never above the budget. The rest is less than a rank that would
            have been next, or what no matrix can have.
    """

    ranks: Mapping[str, int]
    scores: Mapping[str, float]
    meaning: str
    sizes: Mapping[str, tuple[int, int]]
    budget: int
    spent: int

    @property
    def rank_pattern(self) -> dict[str, int]:
        """What rw.LoRAConfig and peft.LoraConfig take: each whole name's rank, 0 left out.

        A pattern fits names that end in it, too, and the first that fits counts: so the longest
        come first.
        """
        return _pattern({module: rank for module, rank in self.ranks.items() if rank > 0})

    def alpha_pattern(self, scaling: float) -> dict[str, float]:
        """As rank_pattern: the alphas with which every update is scaled by alpha / rank = scaling.

        With one alpha for all, matrices of higher ranks would be scaled by less.
        """
        return _pattern({m: scaling * rank for m, rank in self.ranks.items() if rank > 0})

    @property
    def exclude_modules(self) -> str | None:
        """A regular expression of the modules with rank 0, which PEFT does not have; or None."""
        names = [re.escape(module) for module, rank in self.ranks.items() if rank == 0]
        return "|".join(names) or None

    def __str__(self) -> str:
        rows = [("module", "out x in", "rank", "parameters", self.meaning)]
        for module, rank in self.ranks.items():
            out, n_in = self.sizes[module]
            cost, score = rank * (out + n_in), f"{self.scores[module]:.4g}"
            rows.append((module, f"{out} x {n_in}", f"{rank}", f"{cost:,}", score))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            f"{row[0]:<{widths[0]}}  "
            + "  ".join(f"{cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))
            for row in rows
        ]
        return "\n".join([*lines, f"{self.spent:,} of {self.budget:,} parameters"])


def rank_advice(
    evidence: MatrixScores | DirectionScores,
    *,
    budget: int | None = None,
    mean_rank: float | None = None,
    min_rank: int = 1,
    max_rank: int | None = None,
) -> RankAdvice:
    """The ranks that the evidence speaks for, within a budget that they never exceed.

    Scores of matrices are given ranks in proportion, by the largest remainder: each is less than
    one away from its exact share. Scores of directions: those with the largest score for each
    parameter are taken. A rank of an [out, in] matrix costs out + in parameters. Ties go by order.

    Args:
        evidence: of seed_agreement, update_energies, allocated_ranks, squared_gradients or
            input_variances, or scores of your own.
        budget: in parameters.
        mean_rank: in its place, what all matrices would cost at this rank; > 0.
        min_rank: that every matrix gets, as far as its smaller side has directions.
        max_rank: None for a matrix's smaller side, or the directions with a score.

    Raises:
        ValueError: the lowest ranks cost more than the budget, or an argument is wrong.
    """
    if not isinstance(evidence, (MatrixScores, DirectionScores)):
        raise TypeError(
            f"{OWNER}: evidence must be MatrixScores or DirectionScores, as squared_gradients() or "
            f"update_energies() returns them, got {type(evidence).__name__}"
        )
    rooms = _rooms(evidence, min_rank, max_rank)
    limit = _budget(rooms, budget, mean_rank)
    least = cost_of({module: room.lowest for module, room in rooms.items()}, rooms)
    wanted = f"at least {least:,}, which a rank of {min_rank} for all costs"
    _require(limit >= least, OWNER, "budget", wanted, limit)
    ranks = evidence.ranks(rooms, limit)
    scores = {module: evidence.shown(module) for module in ranks}
    return RankAdvice(ranks, scores, evidence.meaning, evidence.sizes, limit, cost_of(ranks, rooms))


def _rooms(
    evidence: MatrixScores | DirectionScores, min_rank: int, max_rank: int | None
) -> dict[str, Room]:
    _require(_is_integer(min_rank) and min_rank >= 0, OWNER, "min_rank", ">= 0", min_rank)
    fits = max_rank is None or (_is_integer(max_rank) and max_rank >= min_rank)
    _require(fits, OWNER, "max_rank", f"an integer >= {min_rank} or None", max_rank)
    rooms = {}
    for module, size in evidence.sizes.items():
        lowest, highest = min(min_rank, *size), evidence.highest(module)
        highest = highest if max_rank is None else min(highest, max_rank)
        rooms[module] = Room(sum(size), lowest, max(lowest, highest))
    return rooms


def _budget(rooms: Rooms, budget: int | None, mean_rank: float | None) -> int:
    if (budget is None) == (mean_rank is None):
        raise ValueError(
            f"{OWNER}: one of budget and mean_rank must be given, got budget={budget!r} and "
            f"mean_rank={mean_rank!r}"
        )
    if mean_rank is None:
        _require(_is_integer(budget), OWNER, "budget", "an integer", budget)
        return budget
    fits = _is_real(mean_rank) and 0 < mean_rank < float("inf")
    _require(fits, OWNER, "mean_rank", "a number > 0", mean_rank)
    return round(mean_rank * sum(room.cost for room in rooms.values()))


def _pattern(values: Mapping[str, float]) -> dict:
    return {re.escape(m): values[m] for m in sorted(values, key=lambda m: (-len(m), m))}
