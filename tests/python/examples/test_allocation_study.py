# The study of allocation, a few trainings of it.
import allocation_study
import forced_moves
import methods
import pytest
import torch
from tasks import TASKS


@pytest.fixture(autouse=True)
def one_thread():
    """Such small layers gain nothing by more."""
    torch.set_num_threads(1)


@pytest.fixture
def one_tuning_seed(monkeypatch):
    monkeypatch.setattr(allocation_study, "TUNING_SEEDS", (100,))


def test_it_goes_on_where_it_was_stopped(one_tuning_seed, monkeypatch, tmp_path):
    options = dict(task="digits", seeds=2, methods="LoRA;spectral, grown", output=tmp_path)
    options["rates"] = "8e-3;1.6e-2"
    first = allocation_study.main(**options)
    assert all(0.8 < value <= 1 for own in first.values() for value in own)
    assert (tmp_path / "digits.png").stat().st_size > 20_000
    for kind in ("map", "lines"):
        assert (tmp_path / f"digits_spectral_grown_{kind}.png").stat().st_size > 5_000
    lines = (tmp_path / "digits.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 2 * (2 + 2)
    (tmp_path / "digits.jsonl").write_text("".join(lines[:-1]))
    made = []
    monkeypatch.setattr(allocation_study, "run", lambda *key: made.append(key) or methods.run(*key))
    assert allocation_study.main(**options) == first and len(made) == 1


@pytest.mark.parametrize("method", methods.METHODS)
def test_methods_end_with_the_parameters_of_lora(method):
    task = TASKS["digits"]()
    outcome = methods.run(task, method, 8e-3, 0)
    cost = {"0": 64 + 128, "2": 256, "4": 256, "6": 256}
    budget = sum(cost.values())
    spent = sum(rank * cost[name] for name, rank in outcome.ranks.items())
    if method == "frozen":
        assert outcome.ranks == {} and outcome.accuracies["test"] < 0.75
        return
    assert budget - max(cost.values()) < spent <= budget
    assert outcome.accuracies["test"] > 0.8
    assert methods.run(task, method, 8e-3, 0) == outcome  # of the seed alone


def test_reviews_are_a_task(monkeypatch):
    task = TASKS["reviews"]()
    model = task.new_model(0)
    loss = next(task.losses(model, 0))
    assert torch.isfinite(loss) and task.steps == 199


def test_a_training_survives_forced_moves():
    found = forced_moves.main(task="digits", steps=400, rate=8e-3, seed=0)
    still, moved = found.values()
    assert len(moved.events) == 40 and len(still.events) == 1
    assert moved.loss < 0.05
    assert abs(moved.accuracies["test"] - still.accuracies["test"]) < 0.03
