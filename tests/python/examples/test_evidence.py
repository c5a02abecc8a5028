# The paper's questions, in short form: on the digits in the place of the reviews.
import evidence
import pytest
import settings
import torch
from settings import Setting
from tasks import TASKS
from typer import BadParameter

PAIR = ("0", "2")


@pytest.fixture
def on_digits(monkeypatch, tmp_path):
    torch.set_num_threads(1)
    monkeypatch.setattr(evidence, "TASKS", {"reviews": TASKS["digits"]})
    monkeypatch.setattr(evidence, "QV", PAIR)
    for name, rank in {"R4": 2, "R8": 8, "R64": 16}.items():
        monkeypatch.setattr(evidence, name, Setting(name, PAIR, rank))
    monkeypatch.setattr("allocation_study.TUNING_SEEDS", (100,))
    made = []
    train = settings.train_and_measure
    monkeypatch.setattr(
        settings, "train_and_measure", lambda *given: made.append(given) or train(*given)
    )
    return tmp_path, made


def test_settings_are_compared_and_trained_once(on_digits, capsys):
    folder, made = on_digits
    both = (Setting("first", ("0",), 2), Setting("pair", PAIR, 1))
    found = evidence.compare("Which", both, 2, "4e-3;8e-3", folder / "which.png")
    assert len(made) == 2 * (2 + 2) and (folder / "which.png").stat().st_size > 10_000
    again = evidence.compare("Which", both[::-1], 2, "4e-3;8e-3", folder / "which.png")
    assert len(made) == 2 * (2 + 2) and again == found
    printed = capsys.readouterr().out
    assert "384" in printed and "448" in printed  # 2 (64 + 128), and 64 + 128 + 2 * 128


def test_adapters_are_looked_at(on_digits, capsys):
    folder, made = on_digits
    evidence.subspaces(rates="8e-3", output=folder)
    evidence.amplification(rates="8e-3", output=folder)
    assert len(made) == 2 + 1 + 1  # two seeds of R64, one of the others; one rate is not tuned
    printed = capsys.readouterr().out
    assert printed.count("figure: ") == 4 and "random directions" in printed
    assert all(path.stat().st_size > 5_000 for path in folder.glob("*.png"))


def test_lines_are_chosen_by_name():
    r4, r8 = evidence.RANKS[2:4]
    assert evidence.chosen(evidence.RANKS, ["q, v, r = 8", "q, v, r = 4"]) == (r4, r8)
    assert evidence.chosen(evidence.RANKS, None) == evidence.RANKS
    with pytest.raises(BadParameter, match="'q, v, r = 64', got 'r 8'"):
        evidence.chosen(evidence.RANKS, ["q, v, r = 4", "r 8"])
