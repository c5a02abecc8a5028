"""Options of adapter_config.json that are not known here: those in force are told."""

import dataclasses
import json
import warnings

import peft
import pytest
import torch
from torch import nn

import rankwise as rw


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.second = nn.Linear(5, 3)


KINDS = {
    "LoRA": peft.LoraConfig(r=2, target_modules=["first", "second"]),
    "AdaLoRA": peft.AdaLoraConfig(init_r=2, total_step=9, target_modules=["first", "second"]),
}


@pytest.fixture(params=KINDS)
def folder(request, tmp_path):
    peft.get_peft_model(Layers(), KINDS[request.param]).save_pretrained(tmp_path)
    return tmp_path


def set_options(folder, **options) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


def told(folder) -> list[str]:
    """What a load warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rw.load_adapter(Layers(), folder)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("value", [True, 0, 0.5, "on", [1], {"a": False}], ids=repr)
def test_an_unknown_option_in_force_is_told_with_its_value(folder, value):
    set_options(folder, use_shiny=value, other_shiny=None)
    (text,) = told(folder)
    assert "adapter_config.json: " in text and '"use_shiny" = ' in text
    assert json.dumps(value).replace(" ", "") in text
    assert "other_shiny" not in text


def test_all_of_them_are_told_at_once(folder):
    set_options(folder, **{f"shiny_{i}": i for i in range(30)})
    (text,) = told(folder)
    assert '"shiny_0" = ' in text and "and 10 more" in text


@pytest.mark.parametrize("value", [None, False, "", [], {}], ids=repr)
def test_one_that_is_not_in_force_is_not(folder, value):
    set_options(folder, use_shiny=value)
    assert told(folder) == []


def test_what_peft_writes_is_all_known(folder):
    assert told(folder) == []


FIELDS = {
    kind: [
        field.name
        for field in dataclasses.fields(config)
        # PEFT does not write the first, and warns where it finds it.
        if field.name not in ("runtime_config", "peft_type")
    ]
    for kind, config in KINDS.items()
}


@pytest.mark.parametrize("kind, field", [(kind, field) for kind in KINDS for field in FIELDS[kind]])
def test_no_option_of_pefts_is_taken_for_an_unknown_one(tmp_path, kind, field):
    """Whatever its value, it is read, known to change nothing, or refused by name."""
    peft.get_peft_model(Layers(), KINDS[kind]).save_pretrained(tmp_path)
    for value in (True, 1, "x", ["x"], {"x": 1}):
        set_options(tmp_path, **{field: value})
        try:
            assert not any(field in text for text in told(tmp_path))
        except rw.FileError as error:
            assert field in str(error) or "lora_" in str(error)


def test_lora_has_no_schedule(tmp_path):
    peft.get_peft_model(Layers(), KINDS["LoRA"]).save_pretrained(tmp_path)
    set_options(tmp_path, target_r=2, beta1=0.5)
    (text,) = told(tmp_path)
    assert '"target_r"' in text and '"beta1"' in text


def test_the_adapter_is_loaded_all_the_same(folder):
    expected = Layers()
    rw.load_adapter(expected, folder)
    set_options(folder, use_shiny=True)
    model = Layers()
    with pytest.warns(UserWarning, match="use_shiny"):
        rw.load_adapter(model, folder)
    assert torch.equal(model.first.lora_A, expected.first.lora_A)
