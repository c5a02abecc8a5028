"""AdaLoRA folders: stock PEFT loads what is saved here and the reverse, pruned or not."""

import json

import peft
import pytest
import torch
from file_models import bert, gpt2, layers_of, loads_in_place, output, prune, randomise
from safetensors.torch import load_file

import rankwise as rw

CONFIG = {"initial_rank": 4, "target_rank": 2, "alpha": 10.0, "total_steps": 10}


def adalora(base=bert, ranks=(), **options) -> torch.nn.Module:
    """A trained-like AdaLoRA model; `ranks` are those of its first layers."""
    options = {"target_modules": ["query", "dense"], **options}
    model = rw.apply_lora(base(), rw.AdaLoRAConfig(**(CONFIG | options))).eval()
    randomise(model, std=0.4)
    for layer, rank in zip(layers_of(model).values(), ranks, strict=False):
        prune(layer, rank)
    return model


OURS = {
    "whole": (bert, {}),
    "pruned": (bert, {"ranks": (3, 0, 4, 1)}),
    "all of rank 0 but one": (bert, {"ranks": (0, 2), "target_modules": ["value"]}),
    "conv1d": (gpt2, {"ranks": (2, 0), "target_modules": ["c_attn", "c_fc"]}),
    "whole modules": (bert, {"modules_to_save": ["embeddings.LayerNorm"], "ranks": (1,)}),
    "a third": (bert, {"initial_rank": 3, "target_rank": 3, "alpha": 1.0, "ranks": (1,)}),
}


@pytest.mark.parametrize("base, options", OURS.values(), ids=OURS)
def test_peft_reads_what_we_save(tmp_path, base, options):
    # Rounding alone reaches 1e-5 in float32; float64 would show a lost 1e-5 of PEFT's scaling.
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-11)):
        model = adalora(lambda dtype=dtype: base().to(dtype), **options)
        rw.save_adapter(model, tmp_path)
        theirs = peft.PeftModel.from_pretrained(base().to(dtype), tmp_path).eval()
        assert theirs.peft_type == peft.PeftType.ADALORA
        torch.testing.assert_close(output(theirs), output(model), rtol=0, atol=tolerance)
        assert (output(model) - output(base().to(dtype))).abs().max() > 1e-3


@pytest.mark.parametrize("base, options", OURS.values(), ids=OURS)
def test_we_read_what_we_save_bit_for_bit(tmp_path, base, options):
    model = adalora(base, **options)
    rw.save_adapter(model, tmp_path)
    again = base()
    assert rw.load_adapter(again, tmp_path) == rw.LoadReport()
    assert torch.equal(output(again.eval()), output(model))
    wanted, got = layers_of(model), layers_of(again)
    assert wanted.keys() == got.keys()
    for name, layer in got.items():
        assert type(layer) is rw.nn.AdaLoRALinear
        for attribute in ("rank", "capacity", "alpha", "scaling"):
            assert getattr(layer, attribute) == getattr(wanted[name], attribute), attribute
        for factor in ("lora_A", "lora_B", "lora_E"):  # inactive directions are zero in both
            assert torch.equal(getattr(layer, factor), getattr(wanted[name], factor)), factor


def test_saving_what_was_loaded_gives_the_same_bytes(tmp_path):
    rw.save_adapter(adalora(ranks=(3, 0)), tmp_path / "a")
    again = bert()
    rw.load_adapter(again, tmp_path / "a")
    rw.save_adapter(again, tmp_path / "b")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_config_is_pefts(tmp_path):
    rw.save_adapter(adalora(ranks=(3, 0), target_modules=["query"]), tmp_path)
    ours = json.loads((tmp_path / "adapter_config.json").read_text())
    theirs = peft.PeftConfig.from_pretrained(tmp_path).to_dict()
    assert ours.keys() <= theirs.keys()
    assert (theirs["init_r"], theirs["target_r"], theirs["total_step"]) == (4, 2, 10)
    assert theirs["rank_pattern"] == {
        "encoder.layer.0.attention.self.query.lora_E": [True, True, True, False],
        "encoder.layer.1.attention.self.query.lora_E": [False] * 4,
    }
    assert theirs["lora_alpha"] / (4 + 1e-5) == pytest.approx(10 / 4, rel=1e-12)
    rw.save_adapter(adalora(), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"] is None
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert "base_model.model.encoder.layer.0.attention.self.query.lora_E" in keys


def peft_adalora(base, **options) -> peft.PeftModel:
    options = {"init_r": 4, "target_r": 1, "lora_alpha": 32, "total_step": 12, **options}
    return peft.get_peft_model(base(), peft.AdaLoraConfig(**options))


def allocate(model: peft.PeftModel, steps: int) -> None:
    """PEFT's own training steps, which mask directions and note the pattern; then float64.

    Not from the start: over a float64 base PEFT trains its rank number, which it does not save.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        model(torch.randint(50, (2, 7)))[0].square().mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    model.double().eval()


PEFT = {
    "before allocation": (bert, 0, {"target_modules": ["query", "dense"]}),
    "while masking": (bert, 6, {"target_modules": ["query", "dense"]}),
    "finished": (bert, 12, {"target_modules": ["query", "key", "dense"], "tfinal": 3}),
    "conv1d": (gpt2, 12, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "whole": (bert, 8, {"target_modules": ["query"], "modules_to_save": ["embeddings.LayerNorm"]}),
}


@pytest.mark.parametrize("base, steps, options", PEFT.values(), ids=PEFT)
def test_we_read_what_peft_saves_and_peft_reads_it_back(tmp_path, base, steps, options):
    theirs = peft_adalora(base, **options)
    randomise(theirs, std=0.4)
    allocate(theirs, steps)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = base().double()
    rw.load_adapter(ours, tmp_path / "theirs")
    torch.testing.assert_close(output(ours.eval()), output(theirs), rtol=0, atol=1e-11)
    pattern = theirs.peft_config["default"].rank_pattern or {}
    for name, layer in layers_of(ours).items():
        assert layer.rank == sum(pattern.get(f"{name}.lora_E", [True] * 4))
        assert layer.capacity == 4
    assert bool(pattern) == (steps > 0)
    rw.save_adapter(ours, tmp_path / "ours")
    files = [
        json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("theirs", "ours")
    ]
    assert files[0]["lora_alpha"] == files[1]["lora_alpha"] == 32
    back = peft.PeftModel.from_pretrained(base().double(), tmp_path / "ours").eval()
    torch.testing.assert_close(output(back), output(theirs), rtol=0, atol=1e-11)


def test_a_layer_that_pefts_allocator_pruned_to_rank_0(tmp_path):
    theirs = peft_adalora(bert, target_modules=["query", "value"], tfinal=3)
    randomise(theirs)
    dead = "encoder.layer.1.attention.self.query"
    with torch.no_grad():
        theirs.get_submodule(f"base_model.model.{dead}").lora_B["default"].zero_()
    theirs.get_submodule(f"base_model.model.{dead}").lora_E["default"].data.zero_()
    allocate(theirs, 12)
    assert sum(theirs.peft_config["default"].rank_pattern[f"{dead}.lora_E.default"]) == 0
    theirs.save_pretrained(tmp_path / "theirs")
    ours = bert().double()
    rw.load_adapter(ours, tmp_path / "theirs")
    assert layers_of(ours)[dead].rank == 0
    torch.testing.assert_close(output(ours.eval()), output(theirs), rtol=0, atol=1e-11)
    rw.save_adapter(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(bert().double(), tmp_path / "ours").eval()
    torch.testing.assert_close(output(back), output(theirs), rtol=0, atol=1e-11)


def test_loading_into_the_adapter_that_is_there(tmp_path):
    model = adalora(ranks=(3, 0), alpha=10 / 3)  # no short decimal: rounded in the file
    loads_in_place(model, tmp_path)


def test_adalora_beside_lora_in_one_model(tmp_path):
    rw.save_adapter(adalora(ranks=(3, 0)), tmp_path / "adalora")
    model = rw.apply_lora(bert(), rw.LoRAConfig(rank=4, target_modules=["query"])).eval()
    randomise(model)
    rw.save_adapter(model, tmp_path / "lora")
    outputs = {"default": output(model), "other": output(adalora(ranks=(3, 0)))}
    rw.load_adapter(model, tmp_path / "adalora", name="other")
    for name, wanted in outputs.items():
        rw.activate_adapter(model, name)
        assert torch.equal(output(model), wanted)
    rw.save_adapter(model, tmp_path / "again", name="other")
    for folder, again in (("lora", "lora"), ("adalora", "again")):
        file, other = (tmp_path / f / "adapter_model.safetensors" for f in (folder, again))
        assert file.read_bytes() == other.read_bytes()
