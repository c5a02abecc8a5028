# Adapted layers that the user replaced: named by what would go wrong, and the ways out.
import copy

import pytest
from replaced_models import LOW, Classifier, Head, classifier
from safetensors.torch import load_file
from torch import nn

import rankwise as rw
from rankwise.config import AdaLoRAConfig, LoRAConfig

REFUSED = {
    "save_adapter": lambda model, path: rw.save_adapter(model, path),
    "export_lora": lambda model, path: rw.export_lora(model, path),
    "merge": lambda model, path: rw.merge(model),
}


@pytest.mark.parametrize("operation", REFUSED)
@pytest.mark.parametrize("config", [LOW, LoRAConfig(rank=2, target_modules=["body.2"])])
def test_an_adapted_layer_that_was_replaced_is_named(tmp_path, operation, config):
    model = classifier(config)
    model.body[2] = nn.Linear(8, 8)
    with pytest.raises(ValueError, match=rf"{operation}: .*'body.2' is a Linear now; put back"):
        REFUSED[operation](model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    wanted = "body.2: replaced by a Linear without the adapter"
    assert wanted in rw.health_check(model).problems
    assert wanted in str(rw.summary(model))


def test_the_allocator_names_it():
    config = AdaLoRAConfig(
        initial_rank=3, target_rank=2, total_steps=9, target_modules=["body.0", "body.2"]
    )
    model = classifier(config)
    model.body[2] = nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"RankAllocator: .*'body.2' is a Linear now"):
        rw.RankAllocator(model, config)


@pytest.mark.parametrize("container", [nn.Linear(8, 8), Classifier(Head())])
def test_what_is_above_the_layer_and_the_whole_module_was_replaced(tmp_path, container):
    model = nn.ModuleDict({"part": Classifier(Head()), "last": nn.Linear(3, 3)})
    config = LoRAConfig(rank=2, target_modules=["body.0", "last"], modules_to_save=["head"])
    rw.apply_lora(model, config)
    model["part"] = container
    with pytest.raises(ValueError, match=r"save_adapter: .*'part\.body\.0'.*'part\.head'"):
        rw.save_adapter(model, tmp_path)


def test_ways_out(tmp_path):
    model = classifier(LOW)
    layer = model.body[2]
    model.body[2] = nn.Linear(8, 8)
    model.body[2] = layer
    rw.save_adapter(model, tmp_path)
    model.body[2] = nn.Linear(8, 8)
    rw.delete_adapter(model, "default")
    rw.add_adapter(model, "default", LOW)
    rw.activate_adapter(model, "default")
    rw.save_adapter(model, tmp_path)
    model.body[2] = copy.deepcopy(model.body[2])
    rw.save_adapter(model, tmp_path)


def test_another_adapter_does_not_care(tmp_path):
    model = classifier(LOW)
    rw.add_adapter(model, "b", LoRAConfig(rank=2, target_modules=["body.0"]))
    rw.activate_adapter(model, "b")
    model.body[2] = nn.Linear(8, 8)
    rw.save_adapter(model, tmp_path)
    assert rw.summary(model).replaced == {}
    with pytest.raises(ValueError, match=r"'body.2' is a Linear now"):
        rw.save_adapter(model, tmp_path, "default")


def test_layers_taken_out_of_a_list_are_gone_on_purpose(tmp_path):
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(4, 4) for _ in range(4))})
    rw.apply_lora(model, LoRAConfig(rank=2, target_modules="all-linear"))
    model["layers"] = model["layers"][:2]
    rw.save_adapter(model, tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 4
