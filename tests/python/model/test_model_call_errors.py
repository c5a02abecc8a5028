# Calls on a model in the wrong state or with wrong names: the message, and the model as it was.
import pytest
from small_models import assert_unchanged, bert, fingerprint
from torch import nn

import rankwise as rw
from rankwise.config import LoRAConfig


@pytest.mark.parametrize(
    "config, message",
    [
        ({}, r"LoRAConfig: target_modules must be a list of names"),
        ({"target_modules": []}, r"LoRAConfig: target_modules must be a list of names.*got \[\]"),
        ({"target_modules": 5}, r"LoRAConfig: target_modules must be a list of names.*got 5"),
        ({"target_modules": ["q", 5]}, r"LoRAConfig: target_modules must be a list of names.*5"),
        ({"target_modules": "x", "modules_to_save": "head"}, r"modules_to_save must be a list"),
        ({"target_modules": "x", "rank": -1}, r"rank must be an integer >= 0, got -1"),
        ({"target_modules": "x", "dropout": 2.0}, r"dropout must be in \[0, 1\], got 2.0"),
        ({"target_modules": "x", "init": "pissa"}, r"init must be one of .*, got 'pissa'"),
        ({"target_modules": "x", "alpha": float("nan")}, r"alpha must be finite, got nan"),
    ],
)
def test_a_configuration_is_checked_when_it_is_made(config, message):
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**config)


def test_applying_twice_is_refused():
    model = rw.apply_lora(bert(), LoRAConfig(target_modules=["query"]))
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"the model has adapters already; use add_adapter\(\)"):
        rw.apply_lora(model, LoRAConfig(target_modules=["key"]))
    assert_unchanged(model, before)


@pytest.mark.parametrize("merged", [False, True])
def test_a_model_with_layers_put_in_by_hand_counts_as_adapted(merged):
    model = nn.Sequential(rw.nn.LoRALinear(4, 4), nn.Linear(4, 4))
    if merged:
        model[0].merge()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="the model has adapters already"):
        rw.apply_lora(model, LoRAConfig(target_modules="all-linear"))
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["", "a.b", "a/b", None, 5])
def test_names_that_cannot_be_folders_are_refused(name):
    model = bert()
    before = fingerprint(model)
    with pytest.raises((ValueError, TypeError), match="name must be a word"):
        rw.apply_lora(model, LoRAConfig(target_modules=["query"]), name)
    assert_unchanged(model, before)


def test_a_name_of_a_modules_method_is_refused_or_works_throughout():
    model = rw.apply_lora(bert(), LoRAConfig(target_modules=["query"]))
    before = fingerprint(model)
    try:
        rw.add_adapter(model, "train", LoRAConfig(target_modules=["query", "value"]))
    except ValueError as error:
        assert "name must be" in str(error)
        assert_unchanged(model, before)
    else:
        rw.activate_adapter(model, "train")
        rw.delete_adapter(model, "train")


@pytest.mark.parametrize(
    "call",
    [
        lambda m: rw.add_adapter(m, "a", LoRAConfig(target_modules=["query"])),
        lambda m: rw.activate_adapter(m, "a"),
        lambda m: rw.delete_adapter(m, "a"),
        rw.adapter_names,
        rw.summary,
        rw.health_check,
        rw.merge,
        rw.unmerge,
        lambda m: rw.disable_adapters(m).__enter__(),
    ],
)
def test_a_model_without_adapters_is_told_so(call):
    model = bert()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"the model has no adapters: call apply_lora\(model, "):
        call(model)
    assert_unchanged(model, before)


def test_unknown_adapter_names_list_those_there_are():
    model = rw.apply_lora(bert(), LoRAConfig(target_modules=["query"]), "a")
    rw.add_adapter(model, "b", LoRAConfig(target_modules=["query"]))
    before = fingerprint(model)
    with pytest.raises(KeyError, match=r"activate_adapter: adapters are \['a', 'b'\], got 'c'"):
        rw.activate_adapter(model, "c")
    with pytest.raises(KeyError, match=r"delete_adapter: adapters are \['a', 'b'\], got 'c'"):
        rw.delete_adapter(model, "c")
    with pytest.raises(ValueError, match="there is an adapter 'a' already"):
        rw.add_adapter(model, "a", LoRAConfig(target_modules=["query"]))
    assert_unchanged(model, before)
