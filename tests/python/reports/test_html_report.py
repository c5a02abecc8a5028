# The report: what it says, that names stay text, and how a real browser shows it.
import io
import math
import re

import pytest
import torch
from browser import Browser
from matplotlib.image import imread

import rankwise as rw
from rankwise.rank_history import RankEvent

HOSTILE = "</p><script>document.title='taken'</script><img src=x onerror=alert(1)>$a$"


def model_of(*names, rank=4):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({name: torch.nn.Linear(8, 6) for name in names})
    rw.apply_lora(model, rw.LoRAConfig(rank=rank, alpha=8.0, target_modules=list(names)))
    for layer in model.values():
        torch.nn.init.normal_(layer.lora_B)
    return model


def text(path):
    """All that is written on the page but for the style."""
    found = re.sub("<(style|svg).*?</\\1>", "", path.read_text(), flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", found))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a small AdaLoRA training, with its history."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
    config = rw.AdaLoRAConfig(
        initial_rank=4, target_rank=2, total_steps=12, warmup_steps=2, final_steps=4,
        target_modules=["0", "1", "2"],
    )  # fmt: skip
    allocator = rw.RankAllocator(rw.apply_lora(model, config), config)
    optimizer = torch.optim.AdamW(rw.parameter_groups(model, lr=0.1))
    allocator.attach(optimizer)
    for _ in range(12):
        optimizer.zero_grad()
        (model(torch.randn(16, 8)) - 1).square().mean().backward()
        optimizer.step()
    rw.save_adapter(model, folder)
    rw.RankHistory.of(allocator).save(folder / "rank_history.json")
    return folder, model, allocator


@pytest.fixture(scope="module")
def page(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    rw.write_report(path, trained[0])
    return path


def test_it_says_what_the_adapter_is(tmp_path):
    model = model_of("q", "v")
    rw.save_adapter(model, tmp_path / "adapter")
    rw.write_report(tmp_path / "report.html", tmp_path / "adapter")
    said = text(tmp_path / "report.html")
    assert "Adapter adapter" in said and "method LORA modules 2 ranks 4 to 4, mean 4.00" in said
    assert "alpha 8 parameters 112" in said and "health ok" in said
    spectrum = rw.analysis.delta_spectrum(model["q"]).S
    ranks = rw.analysis.effective_ranks(spectrum)
    row = f"q 6 x 8 4 2 {spectrum.norm():.4g} {ranks.entropy:.4g} {ranks.stable:.4g} " + (
        f"{ranks.energy_90} {ranks.energy_95} {ranks.energy_99} ok"
    )
    assert row in said
    assert "Training" not in said
    rw.write_report(tmp_path / "model.html", model, title="Mine")
    assert "Mine method LoRA" in text(tmp_path / "model.html")


def test_a_training_has_ranks_and_budget_over_its_steps(trained, tmp_path):
    folder, model, allocator = trained
    for source, history in [(folder, None), (model, allocator)]:
        rw.write_report(tmp_path / "report.html", source, history)
        page = (tmp_path / "report.html").read_text()
        assert page.count("<svg") == 4 and "may keep: directions." in page
    (tmp_path / "alone").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "alone" / name).write_bytes((folder / name).read_bytes())
    rw.write_report(tmp_path / "report.html", tmp_path / "alone")
    page = (tmp_path / "report.html").read_text()  # the schedule is in the folder
    assert page.count("<svg") == 3 and "AdaLoRA&#x27;s schedule" in page


def test_health_is_told_and_the_rest_still_drawn(tmp_path):
    model = model_of("sound", "broken", "new")
    with torch.no_grad():
        model["broken"].lora_A[0, 0] = math.inf
        model["new"].lora_B.zero_()
    rw.write_report(tmp_path / "report.html", model)
    said = text(tmp_path / "report.html")
    assert "health not finite: broken; 1 of 3 modules add nothing" in said
    assert "broken 6 x 8 4 2 - - - - - - not finite" in said and "sound 6 x 8" in said


def test_an_adapter_of_rank_0_and_one_without_modules_have_a_page(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    config = rw.SpectralConfig(initial_rank=0, total_steps=9, target_modules=["0"],
                               initial_budget=16, min_rank=0)  # fmt: skip
    rw.write_report(tmp_path / "report.html", rw.apply_lora(model, config))
    assert "1 of 1 modules add nothing" in text(tmp_path / "report.html")


@pytest.mark.parametrize(
    ("width", "dark"), [(1280, False), (1280, True), (390, False), (390, True)]
)
def test_a_browser_shows_it_whole(browser, page, width, dark):
    browser.open(page, width, dark)
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value("document.querySelectorAll('svg').length") == 4
    pixels = imread(io.BytesIO(browser.screenshot()))[..., :3]
    assert pixels.shape[1] > width - 20 and pixels.std() > 0.05
    assert pixels.mean() < 0.4 if dark else pixels.mean() > 0.8
    boxes = "[...document.querySelectorAll('svg')].map(x => x.getBoundingClientRect().width)"
    assert browser.value(f"Math.min(...{boxes})") >= 540  # can be read
    assert browser.problems == []
    assert {url.split(":")[0] for url in browser.requests} <= {"file", "data"}


def test_names_of_modules_cannot_write_html(browser, tmp_path):
    model = model_of(HOSTILE.replace(".", ""), "q")
    history = rw.RankHistory((HOSTILE, "q"), HOSTILE, (RankEvent(1, 8, (4, 4)),))
    rw.write_report(tmp_path / "report.html", model, history, title=HOSTILE)
    browser.open(tmp_path / "report.html", 390)
    assert browser.value("document.querySelectorAll('script, img').length") == 0
    assert browser.value("document.title") == HOSTILE
    assert browser.value("document.documentElement.scrollWidth") <= 390
    assert browser.problems == []


@pytest.mark.parametrize("content", [
    "no JSON", "[]", '{"names": ["a"], "unit": "directions", "events": [{"step": 1}]}',
    '{"names": ["a"], "unit": "directions", "events": [{"step": 1, "budget": 2, "ranks": [1, 2]}]}',
    '{"names": [1], "unit": "directions", "events": []}',
    '{"names": ["a"], "unit": "d", "events": [{"step": 1, "budget": 2, "ranks": ["1"]}]}',
])  # fmt: skip
def test_another_file_is_no_history(tmp_path, content):
    (tmp_path / "history.json").write_text(content)
    with pytest.raises(ValueError, match="history.json: must be a rank history, as rankwise.Rank"):
        rw.write_report(tmp_path / "report.html", model_of("q"), tmp_path / "history.json")
    assert not (tmp_path / "report.html").exists()


def test_a_history_comes_back_as_it_was(trained, tmp_path):
    history = rw.RankHistory.of(trained[2])
    assert [e.ranks for e in history.events] == [tuple(e.ranks) for e in trained[2].history]
    history.save(tmp_path / "history.json")
    assert rw.RankHistory.load(tmp_path / "history.json") == history
    assert history.unit == "directions" and history.names == ("0", "1", "2")
