# Modules put into an adapted model by the user: what is in the model is what is saved, or an error.
import copy
import pickle

import pytest
import torch
from replaced_models import WHOLE, Classifier, Head, classifier
from safetensors.torch import load_file
from tolerances import assert_same_bits
from torch import nn

import rankwise as rw
from rankwise.config import LoRAConfig


def saved(model: nn.Module, path, name: str | None = None) -> dict[str, torch.Tensor]:
    """What is in the folder, without the adapter's own factors: {name in the model: tensor}."""
    rw.save_adapter(model, path, name)
    tensors = load_file(path / "adapter_model.safetensors")
    tensors = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
    return {key: value for key, value in tensors.items() if "lora_" not in key}


def assert_saved(model: nn.Module, path, name: str = "head") -> None:
    state = {f"{name}.{key}": value for key, value in getattr(model, name).state_dict().items()}
    found = saved(model, path)
    assert found.keys() == state.keys()
    for key, value in state.items():
        assert_same_bits(found[key], value, key)


@pytest.mark.parametrize("twin_of", [None, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("head", [lambda: nn.Linear(8, 5), lambda: nn.Sequential(nn.Linear(8, 8))])
def test_a_replaced_head_is_the_adapters_and_the_base_keeps_its_own(tmp_path, head, twin_of):
    model = classifier()
    plain = copy.deepcopy(model)
    rw.activate_adapter(plain, None)
    model.head = head()
    if twin_of is not None:
        model = twin_of(model)
    assert_saved(model, tmp_path)
    x = torch.randn(2, 8)
    wanted = model(x)
    with rw.disable_adapters(model):
        assert_same_bits(model(x).detach(), plain(x).detach(), "the base's output")
        assert not model.head.dense.weight.requires_grad
    assert_same_bits(model(x).detach(), wanted.detach(), "output after the block")
    assert all(parameter.requires_grad for parameter in model.head.parameters())
    rw.activate_adapter(model, None)
    rw.activate_adapter(model, "default")
    assert_saved(model, tmp_path)


def test_a_part_or_a_parameter_of_the_module_is_replaced(tmp_path):
    model = classifier()
    model.head.out = nn.Linear(8, 5)
    assert_saved(model, tmp_path)
    model.head.dense.weight = nn.Parameter(torch.ones(8, 8))
    assert_saved(model, tmp_path)
    with rw.disable_adapters(model):
        assert model.head.out.out_features == 3
    assert model.head.out.out_features == 5


def test_health_is_asked_of_the_module_that_is_there():
    model = classifier()
    model.head = nn.Linear(8, 5)
    model(torch.randn(2, 8)).sum().backward()
    assert rw.health_check(model).ok
    model.head = nn.Linear(8, 5)
    problems = rw.health_check(model).problems
    assert [p.split(":")[0] for p in problems] == ["head.weight", "head.bias"]


def test_replaced_where_another_adapter_has_its_own(tmp_path):
    model = classifier()
    rw.add_adapter(model, "b", WHOLE)
    rw.activate_adapter(model, "b")
    model.head = nn.Linear(8, 5)
    assert saved(model, tmp_path / "b").keys() == {"head.weight", "head.bias"}
    rw.activate_adapter(model, "default")
    assert type(model.head) is Head
    assert len(saved(model, tmp_path / "a")) == 4
    rw.activate_adapter(model, "b")
    assert model.head.out_features == 5


def out_of_use(model: nn.Module, how: str):
    """Puts the adapter out of use; what is returned puts it into use again."""
    if how == "disabled":
        block = rw.disable_adapters(model)
        block.__enter__()
        return lambda: block.__exit__(None, None, None)
    if how == "another":
        rw.add_adapter(model, "b", LoRAConfig(rank=2, target_modules=["body.2"]))
    rw.activate_adapter(model, None if how == "base" else "b")
    return lambda: rw.activate_adapter(model, "default")


@pytest.mark.parametrize("how", ["disabled", "base", "another"])
def test_another_head_of_the_base_is_no_place_for_the_adapters(tmp_path, how):
    """It cannot be known what is wanted: nothing is lost, and the error says how to go on."""
    model = classifier()
    into_use = out_of_use(model, how)
    trained = saved(model, tmp_path / "before", "default") if how != "disabled" else None
    model.head = nn.Linear(8, 5)
    with pytest.raises(RuntimeError, match=r"'head': the base's module was replaced.*delete_adap"):
        into_use()
    assert model.head.out_features == 5
    if how == "disabled":
        with pytest.raises(RuntimeError, match="'head'"):
            rw.save_adapter(model, tmp_path / "none")
        assert any(p.startswith("head: ") for p in rw.health_check(model).problems)
    assert not (tmp_path / "none").exists()
    model.head = Head()  # one that the adapter's stands for
    rw.activate_adapter(model, "default")
    found = saved(model, tmp_path / "after")
    for key, value in (trained or {}).items():
        assert_same_bits(found[key], value, key)
    model.head = nn.Linear(8, 5)
    assert_saved(model, tmp_path / "after")


def test_a_head_of_the_base_with_the_old_sizes_is_the_bases():
    model = classifier()
    mine, new = model.head, Head()
    with rw.disable_adapters(model):
        model.head = new
    assert model.head is mine
    rw.activate_adapter(model, None)
    assert model.head is new
    assert not any(parameter.requires_grad for parameter in new.parameters())


def test_deleting_the_adapter_leaves_another_head_of_the_base():
    model = classifier()
    rw.activate_adapter(model, None)
    model.head = head = nn.Linear(8, 5)
    rw.delete_adapter(model, "default")
    assert model.head is head and rw.adapter_names(model) == []
    rw.add_adapter(model, "default", WHOLE)
    rw.activate_adapter(model, "default")
    assert model.head is not head and model.head.out_features == 5


def test_a_module_whose_owner_is_known_already_is_refused(tmp_path):
    model = Classifier(Head())
    original = model.head
    rw.apply_lora(model, WHOLE)
    model.head = original
    with pytest.raises(ValueError, match=r"'head'.*copy.deepcopy"):
        rw.save_adapter(model, tmp_path)
    model.head = copy.deepcopy(original).requires_grad_(True)
    assert_saved(model, tmp_path)


def test_a_module_of_two_places_is_replaced_in_both_or_refused(tmp_path):
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "one": nn.Linear(4, 2)})
    model["two"] = model["one"]
    rw.apply_lora(model, LoRAConfig(target_modules=["body"], modules_to_save=["two"]))
    model["one"] = nn.Linear(4, 3)
    with pytest.raises(ValueError, match=r"'one', 'two'.*put the same module in all"):
        rw.save_adapter(model, tmp_path)
    model["two"] = model["one"]
    assert saved(model, tmp_path)["one.weight"].shape == (3, 4)
    with rw.disable_adapters(model):
        assert model["one"] is model["two"] and model["one"].out_features == 2


def test_what_was_taken_out_of_the_model_is_not_saved(tmp_path):
    model = classifier()
    del model.head
    assert saved(model, tmp_path / "without") == {}
    with rw.disable_adapters(model):
        assert not hasattr(model, "head")
    model.head = nn.Linear(8, 5)
    assert_saved(model, tmp_path / "with")


def test_a_module_with_adapters_of_its_own_is_refused(tmp_path):
    model = classifier()
    model.head = rw.nn.LoRALinear(8, 5)
    with pytest.raises(ValueError, match=r"'head' is trained whole.*adapted layers"):
        rw.save_adapter(model, tmp_path)


def test_a_wrapped_module_is_the_same_one(tmp_path):
    model = classifier()
    before = saved(model, tmp_path)
    model.head = torch.compile(model.head, backend="eager")
    assert saved(model, tmp_path).keys() == before.keys()
    model.body[0] = nn.Sequential(model.body[0])
    assert rw.summary(model).replaced == {}
    rw.save_adapter(model, tmp_path)


def test_a_module_that_goes_on_in_a_larger_one(tmp_path):
    model = classifier()
    model.head = nn.Sequential(model.head, nn.Linear(3, 2))
    assert_saved(model, tmp_path)
    with rw.disable_adapters(model):
        assert type(model.head) is Head
    assert_saved(model, tmp_path)
