"""Adapters that begin inside the base, saved: plain LoRA of the untouched base, which all read."""

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from file_models import IDS, bert, gpt2, output
from processes import run_processes
from safetensors.torch import load_file
from sharded_models import WAYS
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import rankwise as rw

TARGETS = {bert: ["query", "dense"], gpt2: ["c_attn", "c_fc"]}


def loss(model, ids):
    return model(ids)[0].square().mean()


FIRST = {
    "pissa": rw.PiSSA(),
    "pissa_iterations": rw.PiSSA(iterations=4),
    "olora": rw.OLoRA(),
    "lora_ga": rw.LoRAGA([IDS], loss),
    "eva": rw.EVA([{"input_ids": IDS}]),
}
every = pytest.mark.parametrize("kind", FIRST)


def begun(kind: str, build=bert, **options) -> nn.Module:
    config = rw.LoRAConfig(rank=3, alpha=6.0, target_modules=TARGETS[build], **options)
    return rw.apply_lora(build(), config, first_values=FIRST[kind])


def trained(model: nn.Module) -> nn.Module:
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return model


def through_peft(folder: Path, build=bert) -> torch.Tensor:
    return output(peft.PeftModel.from_pretrained(build(), folder).eval())


@every
@pytest.mark.parametrize("build", TARGETS)
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("write", [rw.save_adapter, rw.export_lora])
def test_stock_peft_and_we_read_it_over_the_untouched_base(kind, build, rslora, write, tmp_path):
    model = trained(begun(kind, build, rslora=rslora))
    wanted = output(model)
    assert (wanted - output(build())).abs().max() > 1e-2
    write(model, tmp_path)
    assert (through_peft(tmp_path, build) - wanted).abs().max() < 1e-5
    other = build()
    assert rw.load_adapter(other, tmp_path) == rw.LoadReport()
    assert (output(other) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["pissa", "olora", "lora_ga"])
def test_the_folder_has_the_trained_directions_and_the_first_ones(kind, tmp_path):
    model = trained(begun(kind))
    rw.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (6, 12.0, {})
    assert config["init_lora_weights"] is True
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    fresh = begun(kind)
    for name, module in model.named_modules():
        if isinstance(module, rw.nn.LoRALinear):
            start = fresh.get_submodule(name)
            prefix = f"base_model.model.{name}.lora_"
            A, B = tensors[f"{prefix}A.weight"], tensors[f"{prefix}B.weight"]
            assert torch.equal(A, torch.cat([module.lora_A, start.lora_A]))
            assert torch.equal(B, torch.cat([module.lora_B, -start.lora_B], dim=1))


def test_at_the_start_the_folder_is_no_update(tmp_path):
    rw.save_adapter(begun("pissa"), tmp_path)
    assert (through_peft(tmp_path) - output(bert())).abs().max() < 1e-5


def test_eva_writes_the_ranks_it_chose(tmp_path):
    model = begun("eva")
    ranks = {layer.name: layer.rank for layer in rw.summary(model).layers}
    assert len(set(ranks.values())) > 1
    rw.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    written = {name: config["rank_pattern"].get(name, config["r"]) for name in ranks}
    assert written == ranks
    alphas = {name: config["alpha_pattern"].get(name, config["lora_alpha"]) for name in ranks}
    assert alphas == {name: 2.0 * rank for name, rank in ranks.items()}


def test_patterns_of_ranks_and_alphas(tmp_path):
    patterns = dict(rank_pattern={"query": 5}, alpha_pattern={"layer.0.output.dense": 9.0})
    model = trained(begun("pissa", **patterns))
    rw.save_adapter(model, tmp_path)
    assert (through_peft(tmp_path) - output(model)).abs().max() < 1e-5


def test_moved_ranks(tmp_path):
    """Also where no trained direction is left: the base has still lost the first ones."""
    model = trained(begun("pissa"))
    for rank, layer in enumerate(m for m in model.modules() if isinstance(m, rw.nn.LoRALinear)):
        layer.rank = rank % 4
    wanted = output(model)
    rw.save_adapter(model, tmp_path / "saved")
    rw.export_lora(model, tmp_path / "exported")
    assert (through_peft(tmp_path / "saved") - wanted).abs().max() < 1e-5
    assert (through_peft(tmp_path / "exported") - wanted).abs().max() < 1e-5


def test_an_adapter_that_waits_and_a_merged_model_are_saved_alike(tmp_path):
    model = trained(begun("pissa"))
    rw.save_adapter(model, tmp_path / "active")
    rw.activate_adapter(model, None)
    rw.save_adapter(model, tmp_path / "waiting", name="default")
    rw.activate_adapter(model, "default")
    rw.merge(model)
    rw.save_adapter(model, tmp_path / "merged")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        wanted = (tmp_path / "active" / name).read_bytes()
        assert (tmp_path / "waiting" / name).read_bytes() == wanted
        assert (tmp_path / "merged" / name).read_bytes() == wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_over_a_16_bit_base(dtype, tmp_path):
    config = rw.LoRAConfig(rank=3, alpha=6.0, target_modules=TARGETS[bert])
    model = trained(rw.apply_lora(bert().to(dtype), config, first_values=rw.PiSSA()))
    rw.save_adapter(model, tmp_path)
    other = bert().to(dtype)
    rw.load_adapter(other, tmp_path)
    assert torch.equal(output(other), output(model))


def test_loaded_into_the_same_adapter_it_is_refused(tmp_path):
    model = trained(begun("pissa"))
    rw.save_adapter(model, tmp_path)
    state, wanted = copy.deepcopy(model.state_dict()), output(model)
    with pytest.raises(
        rw.FileError, match="adapter begins inside the base .* another name, or del"
    ):
        rw.load_adapter(model, tmp_path)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    rw.load_adapter(model, tmp_path, name="again")
    assert (output(model) - wanted).abs().max() < 1e-5
    rw.delete_adapter(model, "default")
    rw.load_adapter(model, tmp_path)
    assert (output(model) - wanted).abs().max() < 1e-5


def test_the_analysis_sees_what_the_base_gave_up(tmp_path):
    model = begun("pissa")
    for update in rw.analysis.updates(model).values():
        assert update.rank == 6 and update.dense().abs().max() < 1e-7
    rw.save_adapter(trained(model), tmp_path)
    saved = rw.analysis.updates(tmp_path)
    for path, update in rw.analysis.updates(model).items():
        assert torch.equal(update.dense(), saved[path].dense()) and update.dense().any()


def test_two_processes_save_a_sharded_model_as_one_does(tmp_path):
    rw.save_adapter(_small(), tmp_path / "one")
    rw.export_lora(_small(), tmp_path / "one exported")
    run_processes(_save_sharded, 2, tmp_path)


def _small() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential()
    for name, sizes in (("up", (8, 7)), ("down", (7, 8)), ("head", (8, 5))):
        model.add_module(name, nn.Linear(*sizes))
    config = rw.LoRAConfig(rank=3, target_modules=["up", "down"], modules_to_save=["head"])
    return trained(rw.apply_lora(model, config, first_values=rw.PiSSA()))


def _save_sharded(rank: int, folder: Path) -> None:
    for way in WAYS:
        model = _small()
        WAYS[way](model, init_device_mesh("cpu", (2,)))
        rw.save_adapter(model, folder / way)
        rw.export_lora(model, folder / f"{way} exported")
        for ending in ("", " exported"):
            for one in (folder / f"one{ending}").iterdir():
                assert (folder / f"{way}{ending}" / one.name).read_bytes() == one.read_bytes()
