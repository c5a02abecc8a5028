# The command line: what each command prints, its JSON, its exit code and its errors.
import json
import math

import pytest
import torch
from typer.testing import CliRunner

import rankwise as rw
from rankwise.commands import app


def run(*arguments, code=0):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def folders(tmp_path):
    """Two trainings of one model: LoRA of rank 2, with a head, and AdaLoRA of rank 4."""
    configs = {
        "lora": rw.LoRAConfig(rank=2, alpha=4.0, target_modules=["0", "1"], modules_to_save=["2"]),
        "adalora": rw.AdaLoRAConfig(
            initial_rank=4, target_rank=2, total_steps=9, target_modules=["0", "1"]
        ),
    }
    for seed, (name, config) in enumerate(configs.items()):
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(n, n - 1) for n in (6, 5, 4)))
        rw.apply_lora(model, config)
        torch.manual_seed(seed)
        for layer in model:
            for factor in ("lora_B", "lora_E"):
                if getattr(layer, factor, None) is not None:
                    torch.nn.init.normal_(getattr(layer, factor))
        rw.save_adapter(model, tmp_path / name)
    return tmp_path


def test_help_has_a_line_for_each_command():
    lines = run("--help").output.splitlines()
    lines = lines[lines.index("Commands:") + 1 :]
    assert [line.split()[0] for line in lines] == [
        "inspect",
        "analyze",
        "compare",
        "combine",
        "truncate",
        "merge",
        "export",
        "verify",
        "plan",
        "advise",
        "sweep",
        "plot",
        "report",
        "doctor",
    ]
    assert not any(line.endswith("...") for line in lines)


def test_inspect(folders):
    assert run("inspect", folders / "lora").output == (
        "method         LORA\n"
        "rank           2\n"
        "alpha          4\n"
        "rslora         False\n"
        "dropout        0\n"
        "module count   2\n"
        "parameters     40\n"
        "trained whole  15\n"
        "bytes          220\n"
        "health         ok\n"
        "module  out x in  rank  scaling  parameters  health\n"
        "0          5 x 6     2        2          22      ok\n"
        "1          4 x 5     2        2          18      ok\n"
    )
    found = json.loads(run("inspect", folders / "adalora", "--json").output)
    assert found["method"] == "ADALORA" and found["ranks"] == {"least": 4, "most": 4}
    assert found["dtypes"] == ["float32"] and found["base_model"] is None
    assert found["modules"]["1"] == {
        "out_features": 4, "in_features": 5, "rank": 4, "scaling": 6.0, "parameters": 40,
        "health": "ok",
    }  # fmt: skip


def test_inspect_finds_what_is_not_sound(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    rw.apply_lora(model, rw.LoRAConfig(rank=2, target_modules=["0", "1"]))
    rw.save_adapter(model, tmp_path / "new")
    assert "zero: adds nothing" in run("inspect", tmp_path / "new").output
    with torch.no_grad():
        model[1].lora_A[0, 0] = math.inf
    rw.save_adapter(model, tmp_path / "broken")
    found = json.loads(run("inspect", tmp_path / "broken", "--json", code=1).output)
    assert found["health"] == "not finite: 1"


def test_analyze(folders):
    lines = run("analyze", folders / "lora", folders / "adalora").output.splitlines()
    assert lines[0].split("  ")[0] == "module" and "phi(r, r)" in lines[0] and len(lines) == 3
    found = json.loads(run("analyze", folders / "adalora", "--json").output)["modules"]
    for name, update in rw.analysis.updates(folders / "adalora").items():
        wanted = torch.linalg.svdvals(update.dense())[: update.rank]
        assert found[name]["singular_values"] == pytest.approx(wanted.tolist())
        assert found[name]["norm"] == pytest.approx(wanted.norm().item())
        assert found[name]["shared_all"] is None and 1 <= found[name]["energy_99"] <= 4


def test_compare(folders):
    rw.analysis.combine_folders([folders / "adalora"], [1.0], folders / "plain")
    assert run("compare", folders / "adalora", folders / "plain").output.startswith(
        "same function  True\n"
    )
    found = json.loads(
        run("compare", folders / "lora", folders / "adalora", "--json", code=1).output
    )
    assert found["same_function"] is False
    assert found["distances"]["2.weight"] == {"absolute": "inf", "relative": "inf"}


def test_combine_and_truncate(folders):
    output = folders / "sum"
    printed = run(
        "combine", folders / "adalora", folders / "lora", "--weights", "0.5,-1", "-o", output
    )
    assert printed.output == f"written  {output}\nmethod   linear\n"
    parts = [rw.analysis.updates(folders / name)["0"].dense() for name in ("adalora", "lora")]
    found = rw.analysis.updates(output)["0"].dense()
    torch.testing.assert_close(found, 0.5 * parts[0] - parts[1], rtol=0, atol=1e-5)
    answer = json.loads(
        run("truncate", output, "--rank", 3, "-o", folders / "less", "--json").output
    )
    assert rw.analysis.updates(folders / "less")["0"].rank == 3
    values = torch.linalg.svdvals(found)
    assert answer["relative_errors"]["0"] == pytest.approx(
        (values[3:].norm() / values.norm()).item(), rel=1e-4
    )


def test_plan():
    options = ["--total-steps", 100, "--allocation-interval", 10, "--final-steps", 20]
    assert run("plan", *options, "--adapters", 2).output == (
        "allocations     8\n"
        "first           10\n"
        "frozen after    80\n"
        "initial budget  24\n"
        "final budget    16\n"
        "step  triplets kept  mean rank\n"
        "10               21      10.50\n"
        "20               19       9.50\n"
        "30               17       8.50\n"
        "40               17       8.50\n"
        "50               16       8.00\n"
        "60               16       8.00\n"
        "70               16       8.00\n"
        "80               16       8.00\n"
    )
    found = json.loads(run("plan", "--total-steps", 10**5, "--json").output)
    assert found["allocations"] == len(found["budgets"]) == 10**5
    assert len(run("plan", "--total-steps", 10**5).output.splitlines()) == 5 + 1 + 12


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["inspect", "/nowhere"], 1, "rankwise: /nowhere: cannot open the folder: No such file"),
        (["analyze", "/nowhere"], 1, "rankwise: /nowhere: cannot open the folder"),
        (["compare", "/nowhere", "/nowhere"], 1, "rankwise: /nowhere: cannot open the folder"),
        (["truncate", "/nowhere", "--rank", 1, "-o", "/tmp"], 1, "rankwise: /nowhere"),
        (["plan", "--total-steps", 0], 1, "rankwise: AdaLoRA: total_steps must be the optimizer"),
        (["combine", "/a", "-o", "/b", "--weights", "1,x"], 2, "--weights must be numbers"),
        (["combine", "/a", "-o", "/b", "--method", "sum"], 1, "method must be one of"),
        (["inspect"], 2, "Missing argument 'folder'"),
    ],
)
def test_errors_are_messages(arguments, code, message):
    result = run(*arguments, code=code)
    assert message in result.stderr and "Traceback" not in result.output
