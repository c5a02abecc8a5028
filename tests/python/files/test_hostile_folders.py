# Folders and names made to do harm: nothing is run, nothing outside is touched, nothing hangs.
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from file_models import refuses
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import rankwise as rw

CONFIG = rw.LoRAConfig(rank=2, target_modules=["0"])


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3))


@pytest.fixture
def folder(tmp_path):
    rw.save_adapter(rw.apply_lora(model(), CONFIG), tmp_path / "adapter")
    return tmp_path / "adapter"


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
@pytest.mark.parametrize("save", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_a_payload_in_a_pickle_is_not_run(name, save, folder, tmp_path):
    (folder / "adapter_model.safetensors").unlink()
    save(Payload(tmp_path / "touched"), folder / name)
    refuses(model(), folder, name)
    assert not (tmp_path / "touched").exists()


NAMES = st.text(st.sampled_from("./\\~ab\0\n:%"), max_size=12) | st.text(max_size=12)


@given(NAMES)
@settings(max_examples=40)
@example("../outside")
@example("/tmp/outside")
@example("a/../../b")
def test_names_of_adapters_lead_nowhere(name):
    adapted = rw.apply_lora(model(), CONFIG)
    before = list(adapted.state_dict())
    if "/" in name or "." in name:
        with pytest.raises(ValueError, match="name must be a word"):
            rw.add_adapter(adapted, name, CONFIG)
        assert list(adapted.state_dict()) == before and rw.adapter_names(adapted) == ["default"]
        return
    try:
        rw.add_adapter(adapted, name, CONFIG)
    except ValueError as error:
        assert "name" in str(error) and rw.adapter_names(adapted) == ["default"]


FILES = ["adapter_model.safetensors", "adapter_config.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_link_in_a_folder_is_replaced_not_written_through(name, folder, tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (folder / name).unlink()
    (folder / name).symlink_to(outside)
    refuses(model(), folder, name)
    rw.save_adapter(rw.apply_lora(model(), CONFIG), folder)
    assert outside.read_text() == "mine" and not (folder / name).is_symlink()


@pytest.mark.parametrize("name", FILES)
def test_a_device_in_the_place_of_a_file_is_refused(name, folder):
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")  # it never ends
    refuses(model(), folder, name, "must be a regular file")
    with pytest.raises(rw.FileError, match="must be a regular file"):
        rw.save_adapter(rw.apply_lora(model(), CONFIG), folder)


EXPLODES, NAME = "(a+)+b", 40 * "a" + "!"  # years in Python's re
LOADS = f"""
import sys, torch, rankwise as rw
for folder in sys.argv[1:]:
    model = torch.nn.ModuleDict({{"{NAME}": torch.nn.Linear(4, 3)}})
    rw.load_adapter(model, folder)
    print(rw.summary(model).layers[0].rank)
"""


def test_regular_expressions_that_explode_end(tmp_path):
    keys = {"A": torch.ones(2, 4), "B": torch.ones(3, 2)}
    tensors = {f"base_model.model.{NAME}.lora_{x}.weight": value for x, value in keys.items()}
    folders = []
    for option, value in {
        "target_modules": EXPLODES,
        "exclude_modules": EXPLODES,
        "rank_pattern": {EXPLODES: 3},
        "alpha_pattern": {EXPLODES: 3},
    }.items():
        folders.append(tmp_path / option)
        folders[-1].mkdir()
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [NAME]}
        (folders[-1] / FILES[1]).write_text(json.dumps(config | {option: value}))
        save_file(tensors, folders[-1] / FILES[0])
    command = [sys.executable, "-c", LOADS, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["2"] * len(folders), done.stderr[-2000:]
