"""Folders that do not fit or are damaged: an error that says what, and an unchanged model."""

import json
import re
import struct

import pytest
import torch
from file_models import refuses
from torch import nn

import rankwise as rw

CONFIG = rw.LoRAConfig(rank=4, target_modules=["first", "second"])


class TwoLayers(nn.Module):
    def __init__(self, first: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(first, 5)
        self.second = nn.Linear(5, 3)


@pytest.fixture
def folder(tmp_path):
    """A good adapter of TwoLayers."""
    rw.save_adapter(rw.apply_lora(TwoLayers(), CONFIG), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_for_another_model(folder):
    refuses(nn.Sequential(nn.Linear(6, 5)), folder, "first.lora_A.weight: the model has no module")


def test_a_module_with_a_similar_name(folder):
    model = TwoLayers()
    model.seconds = model.second
    del model.second
    refuses(model, folder, "no module 'second'; the nearest is 'seconds'")


def test_another_width(folder):
    refuses(TwoLayers(first=7), folder, r"first.lora_A.weight: must be \[4, 7\], got \[4, 6\]")


def test_everything_wrong_is_listed(folder):
    model = TwoLayers(first=7)
    model.second = nn.ReLU()
    refuses(model, folder, r"must be \[4, 7\], got \[4, 6\]", "second is a ReLU without a place")


def test_another_rank_in_the_adapter_that_is_there(folder):
    model = rw.apply_lora(TwoLayers(), rw.LoRAConfig(rank=3, target_modules=["first", "second"]))
    refuses(model, folder, r"first.lora_A.weight: must be \[3, 6\], got \[4, 6\]")


def test_another_scaling_in_the_adapter_that_is_there(folder):
    config = rw.LoRAConfig(rank=4, alpha=2.0, target_modules=["first", "second"])
    refuses(rw.apply_lora(TwoLayers(), config), folder, "first: scaling must be 0.5, got 4")


def test_missing_and_extra_tensors_and_what_strict_false_does(folder):
    first = rw.LoRAConfig(rank=4, target_modules=["first"])
    model = rw.apply_lora(TwoLayers(), first)
    refuses(model, folder, "second.lora_A.weight: the model's second is a Linear without a place")
    assert rw.load_adapter(model, folder, strict=False).unexpected == [
        "base_model.model.second.lora_A.weight",
        "base_model.model.second.lora_B.weight",
    ]
    rw.save_adapter(model, folder)
    model = rw.apply_lora(TwoLayers(), CONFIG)
    refuses(model, folder, "second.lora_A.weight: missing in the file")
    assert len(rw.load_adapter(model, folder, strict=False).missing) == 2


def test_a_folder_of_which_nothing_fits_is_refused_also_when_not_strict(folder):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(rw.FileError, match="the model has no module 'first'"):
        rw.load_adapter(model, folder, strict=False)
    assert type(model[0]) is torch.nn.Linear


def test_every_truncation(folder):
    path = folder / "adapter_model.safetensors"
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(rw.FileError, match=re.escape(str(path))):
            rw.load_adapter(TwoLayers(), folder)


def test_a_changed_number(folder):
    path = folder / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refuses(TwoLayers(), folder, f"^{re.escape(str(path))}: damaged, or changed since it was saved")


def test_an_edited_configuration_and_how_to_accept_it(folder):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | {"lora_alpha": 1, "revision": "main"}
    path.write_text(json.dumps(config))
    with pytest.raises(rw.FileError, match=f"^{re.escape(str(path))}: damaged, or ") as error:
        rw.load_adapter(TwoLayers(), folder)
    advice, _, name = str(error.value).partition(" in Python: ")[2].partition(" with PATH = ")
    exec(f"import safetensors.torch\n{advice}", {"PATH": name})
    model = TwoLayers()
    rw.load_adapter(model, folder)
    assert model.first.scaling == 0.25


def file_of(entries: dict, data: int) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def entry(shape: list[int], begin: int, end: int) -> dict:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


A, B = "base_model.model.first.lora_A.weight", "base_model.model.first.lora_B.weight"
HOSTILE = {
    "length beyond the file": struct.pack("<Q", 1 << 62) + b"{}",
    "no JSON": struct.pack("<Q", 8) + b"{not js}",
    "deep": struct.pack("<Q", 40_000) + b"[" * 40_000,
    "a huge shape": file_of({A: entry([1 << 40, 1 << 40], 0, 4)}, 4),
    "an overlap": file_of({A: entry([1, 1], 0, 4), B: entry([1, 1], 0, 4)}, 4),
    "a hole": file_of({A: entry([1, 1], 0, 4), B: entry([1, 1], 8, 12)}, 12),
    "A without B": file_of({A: entry([4, 6], 0, 96)}, 96),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files(folder, content):
    (folder / "adapter_model.safetensors").write_bytes(content)
    refuses(TwoLayers(), folder, "adapter_model.safetensors")


FEATURES = {
    "use_dora": True,
    "lora_bias": True,
    "bias": "all",
    "peft_type": "LOHA",
    "r": 1_000_000_000,
    "lora_alpha": "high",
    "init_lora_weights": "pissa",
}


@pytest.mark.parametrize("name, value", FEATURES.items(), ids=FEATURES)
def test_configs_that_mean_another_function(folder, name, value):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    refuses(TwoLayers(), folder, name, "adapter_config.json")


def test_pickle_files_are_not_read(folder):
    (folder / "adapter_model.safetensors").unlink()
    torch.save({}, folder / "adapter_model.bin")
    refuses(TwoLayers(), folder, "pickle files are not read", "weights_only=True")


def test_no_folder(tmp_path):
    refuses(TwoLayers(), tmp_path / "nothing", "nothing")


def test_a_merged_model_loads_nothing(folder):
    model = rw.apply_lora(TwoLayers(), CONFIG)
    rw.merge(model)
    with pytest.raises(RuntimeError, match="load_adapter: the model is merged; call unmerge"):
        rw.load_adapter(model, folder)


def test_saving_names_what_it_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="the model has no adapters"):
        rw.save_adapter(nn.Linear(3, 2), tmp_path)
    model = rw.apply_lora(TwoLayers(), CONFIG)
    with pytest.raises(ValueError, match=r"adapters are \['default'\], got 'other'"):
        rw.save_adapter(model, tmp_path, name="other")


def test_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    model = rw.apply_lora(TwoLayers(), CONFIG)
    with pytest.raises(rw.FileError, match="file"):
        rw.save_adapter(model, tmp_path / "file" / "folder")


def test_a_name_in_the_place_of_strict_is_an_error(tmp_path):
    model = rw.apply_lora(nn.Sequential(nn.Linear(4, 4)), rw.LoRAConfig(target_modules=["0"]))
    rw.save_adapter(model, tmp_path)
    with pytest.raises(TypeError, match="strict must be a bool, got 'second'; a name is name="):
        rw.load_adapter(model, tmp_path, "second")
