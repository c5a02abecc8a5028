# Sweeps: folds, the best rate, going on after a stop, failures, and grids of configurations.
import json
import math

import pytest
import torch
from torch import nn

import rankwise as rw
from rankwise.sweep_grid import adapter_parameters
from rankwise.sweeping import fold_indices

CONFIG = rw.LoRAConfig(target_modules=["q", "v"])


def grid(ranks=(1, 2), **options):
    return rw.rank_grid(CONFIG, list(ranks), **options)


class Task:
    """A score that is best at rate 0.01 and rises with the rank; it notes its calls."""

    def __init__(self, fails=lambda config, rate: None):
        self.calls, self._fails = [], fails

    def __call__(self, config, rate, train, validation, seed):
        self.calls.append((config.rank, config.alpha, rate, tuple(validation), seed))
        assert not set(train) & set(validation) and len(train) + len(validation) == 10
        outcome = self._fails(config, rate)
        if isinstance(outcome, Exception):
            raise outcome
        if outcome is not None:
            return outcome
        return config.rank - abs(math.log10(rate) + 2) + min(validation) / 100


def test_folds_part_all_examples():
    parts = fold_indices(11, 3)
    held = [validation for _, validation in parts]
    assert sorted(i for own in held for i in own) == list(range(11))
    assert sorted(map(len, held)) == [3, 4, 4]
    assert all(sorted(train + own) == list(range(11)) for train, own in parts)
    assert parts == fold_indices(11, 3) and held[0] != [0, 3, 6, 9]


def test_a_sweep_finds_the_best_rate_of_each_rank(tmp_path):
    task, reports = Task(), []
    found = rw.sweep(
        task, 10, grid(), [1e-3, 1e-2, 1e-1], folds=5, seeds=2, file=tmp_path / "r.jsonl",
        progress=lambda done, total: reports.append((done, total)),
    )  # fmt: skip
    assert found.made == len(found.rows) == len(task.calls) == 2 * 3 * 5 * 2
    assert reports == [(i, 60) for i in range(61)]
    scores = [row["score"] for row in found.rows if row["rank"] == 2 and row["rate"] == 1e-2]
    best = found.best("r=2")
    assert best.rate == 1e-2 and best.mean == pytest.approx(sum(scores) / 10)
    assert best.deviation == pytest.approx(torch.tensor(scores, dtype=torch.float64).std().item())
    assert [own.rate for own in found.scored("r=1")] == [1e-3, 1e-2, 1e-1]
    assert {call[:2] for call in task.calls} == {(1, 2.0), (2, 4.0)}


@pytest.mark.parametrize("damage", ["", '{"setting": {"task', "{}\n", "[]\n", '{"setting": 3}\n'])
def test_a_stopped_sweep_goes_on(tmp_path, damage):
    file = tmp_path / "new" / "results.jsonl"

    class Stop(BaseException):
        pass

    def stopped(*arguments):
        if len(task.calls) == 7:
            raise Stop
        return task(*arguments)

    task = Task()
    with pytest.raises(Stop):
        rw.sweep(stopped, 10, grid(), [1e-3, 1e-2], file=file)
    with file.open("a") as written:
        written.write(damage)
    found = rw.sweep(task, 10, grid(), [1e-3, 1e-2], file=file)
    assert found.made == 13 and len(task.calls) == len(set(task.calls)) == 20
    again = rw.sweep(None, 10, grid(), [1e-3, 1e-2], file=file)
    assert again.made == 0 and again.rows == found.rows
    assert found.rows == rw.sweep(Task(), 10, grid(), [1e-3, 1e-2]).rows


def test_a_last_line_that_lacks_its_end_alone_counts(tmp_path):
    file = tmp_path / "results.jsonl"
    rw.sweep(Task(), 10, grid([1]), [1e-2], file=file)
    file.write_text(file.read_text().rstrip("\n"))
    assert rw.sweep(Task(), 10, grid([1, 2]), [1e-2], file=file).made == 5
    assert rw.sweep(None, 10, grid([1, 2]), [1e-2], file=file).made == 0


@pytest.mark.parametrize(
    "other",
    [
        dict(task="another"),
        dict(folds=2),
        dict(examples=11),
        dict(configs=grid([1], alpha=3)),
        dict(configs=rw.rank_grid(rw.LoRAConfig(target_modules=["q"]), [1])),
        dict(rates=[2e-2]),
    ],
    ids=lambda other: next(iter(other)),
)
def test_results_of_other_settings_do_not_count(tmp_path, other):
    file, settings = tmp_path / "results.jsonl", dict(examples=10, configs=grid([1]), rates=[1e-2])
    rw.sweep(lambda *_: 1.0, **settings, file=file)
    found = rw.sweep(lambda *_: 2.0, **settings | other, file=file)
    assert {row["score"] for row in found.rows} == {2.0}
    first = rw.sweep(None, **settings, file=file)
    assert {row["score"] for row in first.rows} == {1.0} and first.made == 0


@pytest.mark.parametrize(
    ("outcome", "why"),
    [
        (RuntimeError("diverged\nat step 3"), "RuntimeError: diverged"),
        (math.nan, "the score is nan"),
        (-math.inf, "the score is -inf"),
        ("good", "ValueError: could not convert string to float: 'good'"),
    ],
)
def test_a_failed_training_is_told_and_loses_no_other(tmp_path, outcome, why):
    file = tmp_path / "results.jsonl"
    task = Task(lambda config, rate: outcome if (config.rank, rate) == (1, 1e-2) else None)
    found = rw.sweep(task, 10, grid(), [1e-3, 1e-2], file=file)
    assert len(found.rows) == 15 and {row["error"] for row in found.failed} == {why}
    assert {(row["name"], row["rate"]) for row in found.failed} == {("r=1", 1e-2)}
    assert found.best("r=1").rate == 1e-3 and found.best("r=2").rate == 1e-2
    for line in file.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    again = rw.sweep(Task(), 10, grid(), [1e-3, 1e-2], file=file)
    assert again.made == 5 and not again.failed and again.best("r=1").rate == 1e-2
    assert rw.sweep(None, 10, grid(), [1e-3, 1e-2], file=file).made == 0


def test_a_rank_without_a_complete_rate_has_no_best():
    found = rw.sweep(Task(lambda *_: math.nan), 10, grid([1]), [1e-2])
    assert found.best("r=1") is None and found.scored("r=1") == []


def test_trainings_are_seeded():
    drawn = []
    rw.sweep(lambda *_: drawn.append(torch.rand(1).item()) or 1.0, 4, grid([1]), [1], folds=2)
    assert drawn[0] == drawn[1]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(10, size) for size in (10, 30, 10))


def test_grids():
    assert [c.alpha for c in grid([1, 4], alpha="r").values()] == [1, 4]
    assert [c.alpha for c in grid([1, 4], alpha="0.5r").values()] == [0.5, 2]
    assert [c.alpha for c in grid([1, 4], alpha="16").values()] == [16, 16]
    assert [c.alpha for c in grid([1, 4], alpha=8).values()] == [8, 8]
    sets = [["q", "v"], ["q", "k", "v"], "k"]
    assert {n: c.rank for n, c in grid([2], targets=sets).items()} == {
        "q,v r=2": 2, "q,k,v r=2": 2, "k r=2": 2,
    }  # fmt: skip
    model = Attention()
    found = grid([4], targets=sets, equal_budget_of=model)
    assert {n: c.rank for n, c in found.items()} == {"q,v r=4": 4, "q,k,v r=2": 2, "k r=4": 4}
    assert [adapter_parameters(model, c) for c in found.values()] == [160, 160, 160]
    assert [c.alpha for c in found.values()] == [8, 4, 8]
    assert type(model.q) is nn.Linear


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: grid([]), r"rank_grid: ranks must be different integers > 0, got \[\]"),
        (lambda: rw.rank_grid(None, [1]), "rank_grid: config must be a LoRAConfig, got None"),
        (lambda: grid([2, 2]), "ranks must be different integers"),
        (lambda: grid([1.5]), "ranks must be different integers"),
        (
            lambda: grid([1], alpha="two"),
            "alpha must be a number, \"r\" or a multiple .* got 'two'",
        ),
        (lambda: grid([1], targets=[]), "targets must be at least one set of modules"),
        (
            lambda: grid([1], targets=[["q"], ["k"]], equal_budget_of=Attention()),
            "parameters of rank 1 must be at least 40, what one rank of k costs, got 20",
        ),
        (lambda: rw.sweep(None, 4, grid(), [1e-3]), "examples must be an integer >= 5, the folds"),
        (lambda: rw.sweep(None, 9, grid(), []), "rates must be numbers > 0"),
        (lambda: rw.sweep(None, 9, grid(), [0.1, 0.1]), "rates must be different"),
        (lambda: rw.sweep(None, 9, grid(), [0.1], folds=1), "folds must be an integer >= 2, got 1"),
        (lambda: rw.sweep(None, 9, grid(), [0.1], seeds=0), "seeds must be an integer >= 1, got 0"),
        (lambda: rw.sweep(None, 9, {}, [0.1]), "configs must be a dict of LoRAConfigs"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
