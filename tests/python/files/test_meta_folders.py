# Folders and models on the meta device: factors are real at once and outlast the base's arrival.
import copy
import pickle
from pathlib import Path

import accelerate
import pytest
import torch
from tolerances import assert_same_bits
from torch import nn

import rankwise as rw
from rankwise.config import AdaLoRAConfig, LoRAConfig

X = torch.tensor([[1, 4, 0], [2, 2, 5]])
LOW = LoRAConfig(rank=2, target_modules=["0", "1", "3"], rank_pattern={"3": 0, "1": 3})
ADALORA = AdaLoRAConfig(initial_rank=3, target_rank=2, total_steps=9, target_modules=["1", "3"])


def plain(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)).eval()


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return plain()


def empty_weights() -> nn.Module:
    with accelerate.init_empty_weights():
        return plain()


@pytest.fixture(params=[LOW, ADALORA], ids=["lora", "adalora"])
def folder(request, tmp_path) -> tuple[Path, torch.Tensor]:
    """(an adapter's folder, its output over plain())."""
    model = rw.apply_lora(plain(), request.param)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    rw.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter", model(X).detach()


def factors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("build", [on_meta, empty_weights])
@pytest.mark.parametrize("twin_of", [None, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_the_base_comes_later_by_assignment(folder, build, twin_of):
    path, wanted = folder
    model = build()
    rw.load_adapter(model, path)
    assert {factor.device.type for factor in factors(model).values()} == {"cpu"}
    assert model[1].weight.is_meta
    if twin_of is not None:
        model = twin_of(model)
    model.load_state_dict(plain().state_dict(), assign=True)
    assert_same_bits(model(X).detach(), wanted, "output")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(factors(model))


def test_the_base_comes_later_by_to_empty(folder):
    path, wanted = folder
    model = on_meta()
    rw.load_adapter(model, path)
    before = {name: factor.detach().clone() for name, factor in factors(model).items()}
    model.to_empty(device="cpu")
    for name, factor in factors(model).items():
        assert_same_bits(factor.detach(), before[name], name)
    model.load_state_dict(plain().state_dict())
    assert_same_bits(model(X).detach(), wanted, "output")


def test_a_change_of_dtype_before_the_base_comes(folder):
    path, _ = folder
    model, ordinary = on_meta(), plain()
    rw.load_adapter(model, path)
    rw.load_adapter(ordinary, path)
    model.double()
    model.load_state_dict(plain().double().state_dict(), assign=True)
    assert_same_bits(model(X).detach(), ordinary.double()(X).detach(), "output")


def test_several_adapters(folder):
    path, wanted = folder
    model = on_meta()
    rw.load_adapter(model, path, name="a")
    rw.load_adapter(model, path, name="b")
    model.load_state_dict(plain().state_dict(), assign=True)
    for name in ("b", "a"):
        rw.activate_adapter(model, name)
        assert_same_bits(model(X).detach(), wanted, name)
    rw.activate_adapter(model, None)
    assert_same_bits(model(X).detach(), plain()(X).detach(), "base")


def test_a_model_that_is_there_in_part(folder):
    path, wanted = folder
    model = on_meta()
    model[1] = plain()[1]
    rw.load_adapter(model, path)
    model.load_state_dict(plain().state_dict(), assign=True)
    assert_same_bits(model(X).detach(), wanted, "output")


def test_into_an_adapter_that_is_on_the_meta_device_itself(tmp_path):
    config = LoRAConfig(rank=2, target_modules=["0", "1"])
    model, ordinary = on_meta(), rw.apply_lora(plain(), config)
    with torch.no_grad():
        ordinary[1].lora_B.normal_()
    rw.save_adapter(ordinary, tmp_path)
    rw.apply_lora(model, config)
    rw.load_adapter(model, tmp_path)
    model.load_state_dict(plain().state_dict(), assign=True)
    assert_same_bits(model(X).detach(), ordinary(X).detach(), "output")


def test_new_adapters_get_their_first_values_when_the_base_comes():
    model = on_meta()
    rw.apply_lora(model, LOW)
    rw.add_adapter(model, "b", LOW)
    assert {factor.device.type for factor in factors(model).values()} == {"meta"}
    model.load_state_dict(plain().state_dict(), assign=True)
    for name in ("default", "b"):
        rw.activate_adapter(model, name)
        assert_same_bits(model(X).detach(), plain()(X).detach(), "output")
        assert model[1].lora_A.any() and not model[1].lora_B.any()
        assert model[1].lora_A.requires_grad


def test_a_folder_with_less_than_the_model_has(tmp_path):
    rw.save_adapter(rw.apply_lora(plain(), LoRAConfig(target_modules=["1"])), tmp_path)
    model = on_meta()
    rw.apply_lora(model, LoRAConfig(target_modules=["1", "3"]))
    report = rw.load_adapter(model, tmp_path, strict=False)
    assert len(report.missing) == 2
    model.load_state_dict(plain().state_dict(), assign=True)
    assert_same_bits(model(X).detach(), plain()(X).detach(), "output")


def test_a_loaded_adapter_is_saved_before_the_base_comes(folder, tmp_path):
    path, wanted = folder
    model, again = on_meta(), plain()
    rw.load_adapter(model, path)
    rw.save_adapter(model, tmp_path / "again")
    rw.load_adapter(again, tmp_path / "again")
    assert_same_bits(again(X).detach(), wanted, "output")


@pytest.mark.parametrize("save", [rw.save_adapter, rw.export_lora])
def test_an_adapter_without_values_is_not_saved(tmp_path, save):
    model = rw.apply_lora(on_meta(), LOW)
    with pytest.raises((rw.FileError, ValueError), match=r"(0|1).* got meta"):
        save(model, tmp_path / "folder")
    assert not list(tmp_path.rglob("*.*"))


def test_modules_trained_whole_need_the_base_first(tmp_path):
    config = LoRAConfig(rank=2, target_modules=["1"], modules_to_save=["3"])
    trained = rw.apply_lora(plain(), config)
    rw.save_adapter(trained, tmp_path)
    model = on_meta()
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(rw.FileError, match=r"\.3\.weight: the model's must .*, got meta"):
        rw.load_adapter(model, tmp_path)
    assert [name for name, _ in model.named_parameters()] == names
    model[3] = plain()[3]
    rw.load_adapter(model, tmp_path)
    state = {key: value for key, value in plain().state_dict().items() if key[0] != "3"}
    model.load_state_dict(state, assign=True, strict=False)
    assert_same_bits(model(X).detach(), trained(X).detach(), "output")


@pytest.mark.parametrize("build", [plain, on_meta])
def test_where_new_parameters_become_meta_nothing_is_loaded(folder, build):
    path, _ = folder
    model = build()
    with (
        accelerate.init_empty_weights(),
        pytest.raises(rw.FileError, match=r"lora_\S*: the model's must .*, got meta"),
    ):
        rw.load_adapter(model, path)
    assert not factors(model)


@pytest.mark.parametrize("build", [plain, on_meta])
def test_torchs_own_context_is_no_obstacle(folder, build):
    path, wanted = folder
    model = build()
    with torch.device("meta"):
        rw.load_adapter(model, path)
    model.load_state_dict(plain().state_dict(), assign=True)
    assert_same_bits(model(X).detach(), wanted, "output")


def test_merging_waits_for_the_base(folder):
    path, _ = folder
    model = on_meta()
    rw.load_adapter(model, path)
    with pytest.raises(RuntimeError, match="merge: .*meta"):
        rw.merge(model)
    assert not any(layer.merged for layer in rw.summary(model).layers)
