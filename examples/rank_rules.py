"""Other methods' rules for rankwise's SpectralAllocator: functions of scores and costs.

Each goes into ``rankwise.SpectralConfig(rule=...)``. They are the allocation alone: the methods'
own parametrisations and scores are not here.
"""

from __future__ import annotations

from collections.abc import Callable

from rankwise import RankQuestion

Rule = Callable[[RankQuestion], list[int]]


def affordable(question: RankQuestion, ranks: list[int], m: int) -> bool:
    """Whether adapter m may have one direction more."""
    more = ranks[:m] + [ranks[m] + 1] + ranks[m + 1 :]
    return ranks[m] < question.highest[m] and question.cost(more) <= question.budget


def increlora(top: int = 2) -> Rule:
    """IncreLoRA (arXiv 2308.12043): the `top` best adapters get a rank each, none loses any.

    It wants a budget above what the first ranks cost, which is left to be spent.
    """

    def rule(question: RankQuestion) -> list[int]:
        ranks = list(question.ranks)
        mean = [sum(own) / max(len(own), 1) for own in question.scores]
        for m in sorted(range(len(ranks)), key=lambda m: -mean[m])[:top]:
            if affordable(question, ranks, m):
                ranks[m] += 1
        return ranks

    return rule


def elalora(moved: int = 4, candidates: int = 2) -> Rule:
    """ElaLoRA (arXiv 2504.00254): the `moved` worst directions go to as many other adapters.

    Of each adapter the `candidates` last directions may go; those with the best of their
    `candidates`-th least scores gain.
    """

    def rule(question: RankQuestion) -> list[int]:
        ranks = list(question.ranks)
        lasts = [
            (score, m)
            for m, own in enumerate(question.scores)
            for score in own[max(len(own) - candidates, question.lowest[m]) :]
        ]
        losers = [m for _, m in sorted(lasts)[:moved]]
        for m in losers:
            ranks[m] -= 1
        others = [m for m in range(len(ranks)) if m not in losers]

        def priority(m: int) -> float:
            own = question.scores[m]
            return own[-min(candidates, len(own))] if own else 0.0

        for m in sorted(others, key=priority, reverse=True)[: len(losers)]:
            if affordable(question, ranks, m):
                ranks[m] += 1
        return ranks

    return rule


def growing(every: int = 1) -> Rule:
    """Growth alone: adapters that have no direction get one, then those of the best weakest ones.

    Begin with ``initial_rank=0, min_rank=0`` and an initial_budget; `every`: ranks an event.
    """

    def rule(question: RankQuestion) -> list[int]:
        ranks = list(question.ranks)
        for m in range(len(ranks)):
            if ranks[m] == 0 and affordable(question, ranks, m):
                ranks[m] = 1
        grown = [m for m, own in enumerate(question.scores) if own]
        for m in sorted(grown, key=lambda m: -question.scores[m][-1])[:every]:
            if affordable(question, ranks, m):
                ranks[m] += 1
        return ranks

    return rule
