# The oracle: AdaLoRA's schedule, averages, scores, choice of directions and penalty in NumPy.
"""Written from arXiv 2303.10512 (sections 3.2, 3.3) and from what its code and PEFT compute where
the paper is misprinted or silent; shares no code with the library. With w the weight after the
optimizer's step and g the gradient that step used, of every element of A, B and E:

    I = |w g|      S <- b1 S + (1 - b1) I      U <- b2 U + (1 - b2) |I - S|      s = S U
    score_i = s(E_i) + mean_j s(A_ij) + mean_j s(B_ji)

    b(t) = b_T + (b_0 - b_T) (1 - (t - warmup) / (T - final - warmup))^3

The averages are held in float64 for float64 parameters and in float32 for all others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

FACTORS = ("A", "B", "E")
Factors = dict[str, np.ndarray]  # A [capacity, in], B [out, capacity], E [capacity, 1]


@dataclass(frozen=True)
class Options:
    """The names of AdaLoRAConfig."""

    target_rank: int
    total_steps: int
    warmup_steps: int = 0
    final_steps: int = 0
    allocation_interval: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    budget_unit: str = "triplets"
    min_rank: int = 0

    @property
    def freeze_step(self) -> int:
        return self.total_steps - self.final_steps

    def budget(self, step: int, initial: int, final: int) -> int:
        if step <= self.warmup_steps:
            return initial
        if step >= self.freeze_step:
            return final
        window = self.freeze_step - self.warmup_steps
        rest = 1 - (step - self.warmup_steps) / window
        return math.floor(final + (initial - final) * rest**3)

    def allocates(self, step: int) -> bool:
        inside = self.warmup_steps < step < self.freeze_step
        return step == self.freeze_step or (inside and step % self.allocation_interval == 0)


def select(scores, modules, costs, budget: int, min_rank: int) -> np.ndarray:
    """bool per direction: the best min_rank of each module, then the best that still fit."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    keep, count = np.zeros(len(scores), bool), [0] * len(costs)
    for reserved in (True, False):
        for i in order:
            m = modules[i]
            wanted = count[m] < min_rank if reserved else costs[m] <= budget
            if wanted and not keep[i]:
                keep[i], count[m], budget = True, count[m] + 1, budget - costs[m]
    return keep


@dataclass
class Module:
    """One adapter: its sizes and its averages, by factor."""

    n_in: int
    n_out: int
    rank: int
    dtype: type  # np.float64 or np.float32
    S: Factors = field(default_factory=dict)
    U: Factors = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {"A": (self.rank, self.n_in), "B": (self.n_out, self.rank), "E": (self.rank, 1)}

    def __post_init__(self) -> None:
        self.S = {f: np.zeros(shape, self.dtype) for f, shape in self.shapes.items()}
        self.U = {f: np.zeros(shape, self.dtype) for f, shape in self.shapes.items()}

    def update(self, factors: Factors, gradients: Factors, b1: float, b2: float) -> None:
        T = self.dtype
        for f in FACTORS:
            if gradients.get(f) is None:
                continue
            now = np.abs(factors[f].astype(T) * gradients[f].astype(T))
            self.S[f] = T(b1) * self.S[f] + T(1 - b1) * now
            self.U[f] = T(b2) * self.U[f] + T(1 - b2) * np.abs(now - self.S[f])

    def scores(self) -> list[float]:
        s = {f: self.S[f].astype(float) * self.U[f].astype(float) for f in FACTORS}
        return [
            s["E"][i, 0] + (math.fsum(s["A"][i]) / self.n_in + math.fsum(s["B"][:, i]) / self.n_out)
            for i in range(self.rank)
        ]


class Oracle:
    """A run: step() for every optimizer step whose gradients are finite."""

    def __init__(self, modules: list[Module], options: Options) -> None:
        self.modules, self.options, self.steps = modules, options, 0
        triplets = options.budget_unit == "triplets"
        self.costs = [1 if triplets else m.n_in + m.n_out for m in modules]
        self.owner = [i for i, m in enumerate(modules) for _ in range(m.rank)]
        self.initial = sum(self.costs[i] for i in self.owner)
        self.final = sum(
            min(m.rank, options.target_rank) * c for m, c in zip(modules, self.costs, strict=True)
        )
        self.kept = np.ones(len(self.owner), bool)
        self.frozen = False
        self.history: list[dict] = []

    def step(self, factors: list[Factors], gradients: list[Factors]) -> bool:
        """Whether E is masked by `kept` after this step."""
        self.steps += 1
        options = self.options
        if self.steps < options.freeze_step:
            for m, w, g in zip(self.modules, factors, gradients, strict=True):
                m.update(w, g, options.beta1, options.beta2)
        if options.allocates(self.steps):
            self.allocate()
        self.frozen = self.frozen or self.steps >= options.freeze_step
        return self.frozen or options.allocates(self.steps)

    def allocate(self) -> None:
        scores, options = self.scores(), self.options
        budget = options.budget(self.steps, self.initial, self.final)
        self.kept = select(scores, self.owner, self.costs, budget, options.min_rank)
        kept, pruned = scores[self.kept], scores[~self.kept]
        entry = {
            "step": self.steps,
            "budget": budget,
            "ranks": self.ranks(),
            "mean_score": scores.mean(),
            "largest_score": scores.max(),
            "lowest_kept": kept.min() if kept.size else math.nan,
            "highest_pruned": pruned.max() if pruned.size else math.nan,
        }
        last = self.history[-1] if self.history else {"budget": None, "ranks": None}
        news = (last["budget"], last["ranks"]) != (budget, entry["ranks"])
        if news or self.steps == options.freeze_step:
            self.history.append(entry)

    def scores(self) -> np.ndarray:
        return np.array([score for m in self.modules for score in m.scores()])

    def pattern(self) -> list[np.ndarray]:
        ends = np.cumsum([m.rank for m in self.modules])
        return np.split(self.kept, ends[:-1])

    def ranks(self) -> list[int]:
        return [int(kept.sum()) for kept in self.pattern()]


def penalty(As, Bs, ranks, squared: bool) -> tuple[float, list[np.ndarray], list[np.ndarray]]:
    """The orthogonality penalty over the leading directions, and its gradients for A and B."""

    def term(rows: np.ndarray) -> tuple[float, np.ndarray]:
        D = rows @ rows.T - np.eye(len(rows))
        norm = math.sqrt((D * D).sum())
        if squared:
            return norm**2, 4 * D @ rows
        return norm / (2 * len(As)), 2 * D @ rows / (norm or 1) / (2 * len(As))

    value, gA, gB = 0.0, [], []
    for A, B, rank in zip(As, Bs, ranks, strict=True):
        gradient = np.zeros_like(A), np.zeros_like(B)
        a, gradient[0][:rank] = term(A[:rank])
        b, transposed = term(B[:, :rank].T)
        gradient[1][:, :rank] = transposed.T
        value += a + b
        gA.append(gradient[0])
        gB.append(gradient[1])
    return value, gA, gB
