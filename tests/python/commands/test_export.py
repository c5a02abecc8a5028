# `rankwise export`: the same function from a folder alone, rounded once, that PEFT reads.
import json
import warnings

import peft
import pytest
import torch
from command_line import run
from safetensors.torch import load_file

import rankwise as rw

CONFIGS = {
    "patterns": rw.LoRAConfig(
        rank=2, target_modules=["0", "1"], rank_pattern={"1": 3}, alpha_pattern={"0": 5.0},
        rslora=True, modules_to_save=["2"],
    ),
    "adalora": rw.AdaLoRAConfig(
        initial_rank=4, target_rank=2, total_steps=9, target_modules=["0", "1"]
    ),
}  # fmt: skip


def plain():
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(n, n - 1) for n in (6, 5, 4)))


@pytest.fixture(params=CONFIGS)
def adapted(request, tmp_path):
    """A model, and its adapter's folder."""
    model = rw.apply_lora(plain(), CONFIGS[request.param])
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    rw.save_adapter(model, tmp_path / "adapter")
    return model, tmp_path / "adapter"


def test_a_folder_is_exported_as_its_model_is(adapted, tmp_path):
    model, folder = adapted
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of modules trained whole
        rw.export_lora(model, tmp_path / "model")
    run("export", folder, "-o", tmp_path / "out")
    found, wanted = (
        load_file(tmp_path / n / "adapter_model.safetensors") for n in ("out", "model")
    )
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_values_are_rounded_once(adapted, tmp_path, name):
    _, folder = adapted
    found = json.loads(
        run("export", folder, "-o", tmp_path / "out", "--dtype", name, "--json").stdout
    )
    assert found["dtypes"] == [name]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, name)}
    for module, update in rw.analysis.updates(folder).items():
        E = 1 if update.lora_E is None else update.lora_E.double().t()
        exact = update.scaling * update.lora_B.double() * E
        B = tensors[f"base_model.model.{module}.lora_B.weight"]
        error = (B[:, : update.rank].double() - exact).abs()
        assert (error <= exact.abs() * torch.finfo(B.dtype).eps / 2).all()


def test_peft_computes_the_same(adapted, tmp_path):
    model, folder = adapted
    run("export", folder, "-o", tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(plain(), tmp_path / "out")
    x = torch.randn(3, 6)
    torch.testing.assert_close(theirs(x), model(x))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] and not config["rank_pattern"]


def test_golden_output(adapted, tmp_path):
    _, folder = adapted
    rank = max(update.rank for update in rw.analysis.updates(folder).values())
    assert run("export", folder, "-o", tmp_path / "out").output == (
        f"written       {tmp_path / 'out'}\nrank          {rank}\nmodule count  2\n"
    )


def test_errors(adapted, tmp_path):
    model, folder = adapted
    torch.nn.init.constant_(model[0].lora_A, 1e6)
    rw.save_adapter(model, folder)
    out = tmp_path / "out"
    error = run("export", folder, "-o", out, "--dtype", "float16", code=1).stderr
    assert "rankwise: export: base_model.model.0.lora_A.weight would not be finite" in error
    assert not out.exists()
    assert "float8" in run("export", folder, "-o", out, "--dtype", "float8", code=2).stderr
    assert "cannot open the folder" in run("export", "/nowhere", "-o", out, code=1).stderr
