"""LoRA at other targets and ranks: one training of a task each, whose adapter is kept."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from allocation_study import best_rate, tunings
from methods import train_and_measure
from results import Results
from tasks import Task
from torch import nn

import rankwise as rw

SCALING = 2.0  # alpha / rank of all; the best rate falls with the rank then (docs/evidence.md)


@dataclass(frozen=True)
class Setting:
    """What is adapted, and at which rank."""

    name: str
    targets: tuple[str, ...] | str
    rank: int

    @property
    def adapts(self) -> str:
        """Targets and rank, which settings of several names may share."""
        targets = self.targets if isinstance(self.targets, str) else ", ".join(self.targets)
        return f"{targets}, r {self.rank}"

    def adapted(self, task: Task, seed: int) -> nn.Module:
        """A new model."""
        torch.manual_seed(seed)
        targets = self.targets if isinstance(self.targets, str) else list(self.targets)
        config = rw.LoRAConfig(
            rank=self.rank, alpha=SCALING * self.rank, target_modules=targets,
            modules_to_save=task.whole,
        )  # fmt: skip
        return rw.apply_lora(task.new_model(seed), config)

    def parameters(self, task: Task) -> int:
        layers = rw.summary(self.adapted(task, 0)).layers
        return sum(layer.rank * (layer.in_features + layer.out_features) for layer in layers)


class Trainings:
    """Outcomes by setting, rate and seed, and adapters by setting and seed, in a folder."""

    def __init__(self, task: Task, folder: Path, rates: list[float], tick=lambda: None) -> None:
        self.task, self._folder, self._rates, self._tick = task, folder, rates, tick
        self._results = Results(folder / f"{task.name}_settings.jsonl")

    def count(self, seeds: int) -> int:
        """Trainings of a setting."""
        return tunings(self._rates) + seeds

    def rate(self, setting: Setting) -> float:
        """The best on the validation split."""
        return best_rate(self._rates, lambda rate, seed: self._outcome(setting, rate, seed))

    def outcomes(self, setting: Setting, seeds: int) -> list[dict]:
        """At the best rate."""
        rate = self.rate(setting)
        return [self._outcome(setting, rate, seed) for seed in range(seeds)]

    def adapter(self, setting: Setting, seed: int) -> dict[str, rw.analysis.Update]:
        """{module: its update}, trained at the best rate."""
        self._outcome(setting, self.rate(setting), seed)
        return rw.analysis.updates(self._path(setting, self.rate(setting), seed))

    def _path(self, setting: Setting, rate: float, seed: int) -> Path:
        return self._folder / "adapters" / f"{self.task.name}, {setting.adapts}, {rate:g}, {seed}"

    def _outcome(self, setting: Setting, rate: float, seed: int) -> dict:
        def make() -> dict:
            model = setting.adapted(self.task, seed)
            outcome = asdict(train_and_measure(self.task, model, None, rate, seed))
            rw.save_adapter(model, self._path(setting, rate, seed))
            return outcome

        self._tick()
        return self._results.outcome((self.task.steps, setting.adapts, rate, seed), make)
