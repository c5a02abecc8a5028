# The commands that draw: what they write, print and refuse.
import json
import sys

import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import save_file
from typer.testing import CliRunner

import rankwise as rw
from rankwise.commands import app
from rankwise.folder_amplification import amplifications
from rankwise.rank_history import RankEvent


def run(*arguments, code=0):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Adapters of ranks 2 and 4 over one model, and the history of a training in the first."""
    folder = tmp_path_factory.mktemp("adapters")
    for rank in (2, 4):
        torch.manual_seed(rank)
        model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
        rw.apply_lora(model, rw.LoRAConfig(rank=rank, target_modules=["0", "1"]))
        for layer in model:
            torch.nn.init.normal_(layer.lora_B)
        rw.save_adapter(model, folder / f"r{rank}")
    events = tuple(RankEvent(step, 6 - step, (3 - step, 3)) for step in (1, 2))
    rw.RankHistory(("0", "1"), "directions", events).save(folder / "r2" / "rank_history.json")
    return folder


@pytest.mark.parametrize(("kind", "names"), [
    ("ranks", ["r2"]), ("spectra", ["r4"]), ("similarity", ["r2", "r4"]), ("history", ["r2"]),
])  # fmt: skip
def test_plot(folders, tmp_path, kind, names):
    output = tmp_path / "picture.png"
    paths = [folders / name for name in names]
    printed = run("plot", kind, *paths, "-o", output).output
    assert printed == f"written  {output}\nkind     {kind}\nmodules  2\n"
    assert imread(output)[..., :3].std() > 0.1
    svg = tmp_path / "picture.svg"
    found = run("plot", kind, *paths, "-o", svg, "--module", "1", "--json").output
    assert json.loads(found) == {"written": str(svg), "kind": kind, "modules": 1}
    assert svg.read_text().startswith("<?xml")


def test_amplification_of_a_model_s_folder(folders, tmp_path):
    (model := tmp_path / "model").mkdir()
    (model / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    weights = {f"net.{i}.weight": torch.randn(5 - i, 6 - i) for i in (0, 1)}
    save_file(weights, model / "model.safetensors")
    found = amplifications(folders / "r2", model)
    for name, update in rw.analysis.updates(folders / "r2").items():
        weight = weights[f"net.{name}.weight"]
        assert found[name] == rw.analysis.amplification_factor(weight, update)
    output = tmp_path / "picture.png"
    printed = run("plot", "amplification", folders / "r2", "--model", model, "-o", output).output
    assert printed == f"written  {output}\nkind     amplification\nmodules  2\n"
    run("report", folders / "r2", "--model", model, "-o", tmp_path / "report.html")
    assert "<h2>Amplification</h2>" in (tmp_path / "report.html").read_text()


def test_report(folders, tmp_path):
    output = tmp_path / "report.html"
    options = ["--title", "Mine", "--history", folders / "r2" / "rank_history.json", "--json"]
    found = json.loads(run("report", folders / "r4", "-o", output, *options).output)
    page = output.read_text()
    assert found == {"written": str(output), "bytes": len(page.encode())}
    assert "<h1>Mine</h1>" in page and "<h2>Training</h2>" in page
    printed = run("report", folders / "r4", "-o", output).output
    assert printed == f"written  {output}\nbytes    {output.stat().st_size}\n"
    assert "<h1>Adapter r4</h1>" in output.read_text()


@pytest.mark.parametrize(("arguments", "code", "message"), [
    (["plot", "ranks", "/nowhere", "-o", "x.png"], 1, "rankwise: /nowhere: cannot open the folder"),
    (["plot", "ranks", "/a", "/b", "-o", "x.png"], 2, "ranks takes 1 folder, got 2"),
    (["plot", "similarity", "/a", "-o", "x.png"], 2, "similarity takes 2 folders, got 1"),
    (["plot", "ranks", "/a", "-o", "x.jpg"], 2, "--output must end in .png or .svg, got 'x.jpg'"),
    (["plot", "amplification", "/a", "-o", "x.png"], 2, "amplification, and it alone, takes"),
    (["plot", "ranks", "/a", "-o", "x.png", "--model", "/m"], 2, "it alone, takes --model"),
    (["report", "r2", "-o", "x.html", "--model", "/m"], 1, "/m/config.json"),
    (["plot", "pie", "/a", "-o", "x.png"], 2, "'pie' is not one of"),
    (["plot", "ranks", "r2", "-o", "x.png", "--module", "zzz"], 1, "no module with 'zzz' in its"),
    (["plot", "history", "r2", "-o", "x.png", "--module", "zzz"], 1, "no module with 'zzz' in its"),
    (["plot", "history", "r4", "-o", "x.png"], 1, "rank_history.json"),
    (["report", "/nowhere", "-o", "x.html"], 1, "rankwise: /nowhere: cannot open the folder"),
    (["report", "r2", "-o", "/nowhere/x.html"], 1, "/nowhere/x.html"),
])  # fmt: skip
def test_errors_are_messages(folders, arguments, code, message, monkeypatch):
    monkeypatch.chdir(folders)
    result = run(*arguments, code=code)
    assert message in result.stderr and "Traceback" not in result.output
    assert len(result.stderr.splitlines()) == 1 or code == 2


def test_without_matplotlib_one_sentence_says_so(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it was not installed
    monkeypatch.delitem(sys.modules, "rankwise.plots", raising=False)
    monkeypatch.delattr(rw, "plots", raising=False)
    result = run("plot", "ranks", folders / "r2", "-o", "x.png", code=1)
    wanted = 'rankwise: rankwise.plots needs matplotlib: pip install "rankwise[plots]"\n'
    assert result.stderr == wanted
