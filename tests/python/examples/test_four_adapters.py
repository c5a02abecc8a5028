# Four adapters over one encoder, on a few texts of each kind.
import four_adapters
import peft
import snippets
from figure import draw_accuracies_of_kinds


def test_every_kind_is_read():
    for kind, (_, count) in snippets.FILES.items():
        texts = snippets.load_snippets(kind=kind)
        assert len(texts) == count and all(-4 <= text.rating <= 4 for text in texts)


def test_they_are_trained_saved_and_switched(tmp_path):
    accuracies = four_adapters.main(epochs=1, texts=80, output=tmp_path)
    assert [len(row) for row in accuracies] == [4] * 4
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
    configs = [peft.PeftConfig.from_pretrained(tmp_path / kind) for kind in four_adapters.KINDS]
    assert {(config.r, *config.modules_to_save) for config in configs} == {(4, "head")}


def test_the_figure(tmp_path):
    draw_accuracies_of_kinds([[0.5, 0.75], [1.0, 0.6]], ("a", "b"), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5_000
