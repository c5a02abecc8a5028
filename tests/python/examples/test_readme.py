"""The pages' examples and links: Python blocks run as they stand, C++ blocks are in programs."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cpp_programs import output_of
from test_cpp_reference import EXAMPLES

import rankwise as rw

ROOT = Path(__file__).resolve().parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language: str, page: Path) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def prose(page: Path) -> str:
    return re.sub("```.*?```", "", page.read_text(), flags=re.DOTALL)


PYTHON = {
    f"{page.stem}-{i}": code
    for page in PAGES
    if page.stem != "tutorial"  # one program: test_tutorial.py
    for i, code in enumerate(blocks("python", page))
}


# Sharded models hold their process group, whose threads must end before Python does.
RUN = "import gc, runpy; runpy.run_path('example.py', run_name='__main__'); gc.collect()"


@pytest.mark.parametrize("code", PYTHON.values(), ids=PYTHON)
def test_python_examples(code, tmp_path):
    (tmp_path / "example.py").write_text(code)
    (tmp_path / "build").mkdir()
    subprocess.run([sys.executable, "-X", "faulthandler", "-c", RUN], cwd=tmp_path, check=True)


def test_cpp_examples_are_parts_of_the_programs():
    programs = [path.read_text() for path in (ROOT / "examples" / "cpp").glob("*.cpp")]
    parts = [block for page in PAGES for block in blocks("cpp", page) if block not in EXAMPLES]
    assert parts
    for part in parts:
        assert any(part in program for program in programs), part


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if "://" not in link:
            path, _, section = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not section or section in sections(target), link


def sections(page: Path) -> set[str]:
    """What links call the page's sections: the headings in lower case, with hyphens for spaces."""
    titles = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_layer_program_learns(programs):
    result = subprocess.run([programs / "layer"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("loss ")


def test_the_adalora_program_finds_the_ranks(programs):
    result = subprocess.run([programs / "adalora"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("narrow: rank 1 of 6\nwide: rank 5 of 6\nloss ")


def test_the_spectral_program_moves_ranks_above_the_initial_one(programs):
    result = subprocess.run([programs / "spectral"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    fixed, moved = result.stdout.split("loss ")[:2]
    ranks = [int(line.rpartition(" ")[2]) for line in moved.splitlines() if ": rank " in line]
    assert [int(line.rpartition(" ")[2]) for line in fixed.splitlines()] == [6, 6, 6, 6]
    assert sum(ranks) == 24 and max(ranks[0], ranks[3]) < 6 < ranks[1] <= ranks[2]


def test_the_adapter_program_reads_what_python_saved(programs, tmp_path):
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3))
    rw.apply_lora(model, rw.LoRAConfig(rank=2, alpha=4.0, target_modules=["0", "1"]))
    torch.nn.init.normal_(model[0].lora_B)
    rw.save_adapter(model, tmp_path)
    run = [programs / "merge_adapter", tmp_path]
    lines = subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()
    norm = (2.0 * model[0].lora_B @ model[0].lora_A).norm().item()
    assert lines[0].startswith("0: rank 2, scaling 2, update norm ")
    assert abs(float(lines[0].split()[-1]) - norm) < 1e-5
    assert lines[1] == "1: rank 2, scaling 2, update norm 0.000000"


def test_the_adapter_program_reads_adalora(programs, tmp_path):
    import torch

    layer = rw.nn.AdaLoRALinear(6, 5, rank=2, alpha=4.0)
    torch.nn.init.normal_(layer.lora_E)
    rw.save_adapter(torch.nn.Sequential(layer), tmp_path)
    run = [programs / "merge_adapter", tmp_path]
    line = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    norm = (2.0 * layer.lora_B @ (layer.lora_E * layer.lora_A)).norm().item()
    assert line.startswith("0: rank 2, scaling 2, update norm ")
    assert abs(float(line.split()[-1]) - norm) < 2e-6


def test_the_adapter_program_names_a_bad_folder(programs, tmp_path):
    run = [programs / "merge_adapter", tmp_path / "nothing"]
    result = subprocess.run(run, capture_output=True, text=True)
    assert result.returncode == 1
    assert str(tmp_path / "nothing") in result.stderr


def test_the_combination_program_adds_two_folders(programs, tmp_path):
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3))
    rw.apply_lora(model, rw.LoRAConfig(rank=2, alpha=4.0, target_modules=["0", "1"]), name="lora")
    rw.add_adapter(
        model,
        "adalora",
        rw.AdaLoRAConfig(initial_rank=3, target_rank=1, total_steps=9, target_modules=["0"]),
    )
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    folders = [tmp_path / "lora", tmp_path / "adalora"]
    for folder in folders:
        rw.save_adapter(model, folder, folder.name)
    arguments = [folders[0], "0.5", folders[1], "-2", tmp_path / "sum"]
    lines = output_of(programs / "combine", *arguments).splitlines()
    assert lines[0] == str(folders[0]) and lines[1].startswith("  0: rank 2, norm ")
    assert [line for line in lines if line.startswith("  1: ")][1] == "  1: 1.0000"
    rw.analysis.combine_folders(folders, [0.5, -2.0], tmp_path / "python")
    assert rw.analysis.same_function(tmp_path / "sum", tmp_path / "python", tolerance=0)
    output_of(programs / "combine", *arguments[:4], tmp_path / "less", "2")
    found = rw.analysis.distances(tmp_path / "sum", tmp_path / "less")
    exact = rw.analysis.truncate(rw.analysis.updates(tmp_path / "sum")["0"], 2)
    assert found["0"].absolute == pytest.approx(exact.error, rel=1e-5)


def test_the_combination_program_names_what_is_wrong(programs, tmp_path):
    import torch

    run = [programs / "combine", tmp_path / "nothing", "1", tmp_path / "nothing", "1", tmp_path]
    result = subprocess.run(run, capture_output=True, text=True)
    assert result.returncode == 1 and str(tmp_path / "nothing") in result.stderr
    assert subprocess.run(run[:3], capture_output=True).returncode == 2
    model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    rw.save_adapter(rw.apply_lora(model, rw.LoRAConfig(target_modules=["0"])), tmp_path)
    run = [programs / "combine", tmp_path, "1", tmp_path, "half", tmp_path]
    result = subprocess.run(run, capture_output=True, text=True)
    assert result.returncode == 1 and "numbers, got half" in result.stderr


def test_the_advice_program_has_pythons_ranks(programs, tmp_path):
    import torch

    folders = [tmp_path / "1", tmp_path / "2"]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(20, 20), torch.nn.Linear(20, 5))
        rw.apply_lora(model, rw.LoRAConfig(rank=3, target_modules=["0", "1"]))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        with torch.no_grad():
            model[0].lora_A[0].fill_(9)  # what both agree on
        rw.save_adapter(model, folder)
    printed = output_of(programs / "advise", *folders, "160")
    for evidence in (
        rw.analysis.update_energies(folders[0]),
        rw.analysis.seed_agreement(*folders),
    ):
        advice = rw.analysis.rank_advice(evidence, budget=160)
        for module, (out, n_in) in advice.sizes.items():
            score, rank = advice.scores[module], advice.ranks[module]
            assert f"  {module}: {out} x {n_in}, score {score:.4g}, rank {rank}\n" in printed
        assert f"  {advice.spent} of 160 parameters\n" in printed
    run = [programs / "advise", *folders, "many"]
    result = subprocess.run(run, capture_output=True, text=True)
    assert result.returncode == 1 and "whole number, got many" in result.stderr


def test_python_and_peft_load_what_the_module_program_saved(programs, tmp_path):
    import peft
    import torch

    folders = tmp_path / "adalora", tmp_path / "plain"
    run = [programs / "module", *folders]
    printed = subprocess.run(run, capture_output=True, text=True, check=True).stdout.split()
    wanted = torch.tensor([[float(value) for value in printed]])

    class Net(torch.nn.Module):
        def __init__(self, linear, **options):
            super().__init__()
            self.up, self.down = linear(16, 24, **options), linear(24, 4, **options)

        def forward(self, x):
            return self.down(self.up(x).tanh())

    x = torch.ones(1, 16)
    for folder, kind in zip(folders, (rw.nn.AdaLoRALinear, rw.nn.LoRALinear), strict=True):
        torch.manual_seed(0)  # the program's: both languages draw the same base
        seeded = Net(rw.nn.AdaLoRALinear, rank=6, alpha=12.0)
        base = Net(torch.nn.Linear)
        base.load_state_dict({key: seeded.state_dict()[key] for key in base.state_dict()})
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
        assert rw.load_adapter(base, folder) == rw.LoadReport()
        assert type(base.up) is type(base.down) is kind
        torch.testing.assert_close(base(x), wanted, rtol=0, atol=1e-6)
        torch.testing.assert_close(theirs(x), wanted, rtol=0, atol=1e-6)
    assert (seeded(x) - wanted).abs().max() > 1e-2
