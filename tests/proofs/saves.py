"""Kinds of saves: what is in a folder before, what is saved over it, and how it is read."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from pruned_training import PrunedTraining
from safetensors.torch import load_file, save_file
from torch import nn

import rankwise as rw
from rankwise.folder_changes import changes_of
from rankwise.folder_merge import merge_folder
from rankwise.model_folder import read_model_folder

Save = Callable[[Path], object]


@dataclass(frozen=True)
class Kind:
    """`read` gives all that a folder holds, None where it holds nothing."""

    old: Save
    new: Save
    read: Callable[[Path], object]


def _plain() -> nn.Module:
    torch.manual_seed(2)
    return nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in "ab"})


def _adapted(config, seed: int) -> nn.Module:
    model = rw.apply_lora(_plain(), config)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return model


def _read_adapter(folder: Path) -> object:
    model = _plain()
    try:
        rw.load_adapter(model, folder)
    except rw.FileError as error:
        if "no such file" not in str(error) and "open the folder" not in str(error):
            raise
        return None
    return [rw.summary(model), model.state_dict()]


def _adapters() -> dict[str, Kind]:
    first = _adapted(rw.LoRAConfig(rank=2, target_modules=["a"], modules_to_save=["b"]), 3)
    second = _adapted(rw.LoRAConfig(rank=3, target_modules=["a", "b"]), 4)
    schedule = dict(initial_rank=4, target_rank=2, total_steps=9)
    third = _adapted(rw.AdaLoRAConfig(target_modules=["a", "b"], **schedule), 5)
    save = {m: lambda folder, m=m: rw.save_adapter(m, folder) for m in (first, second, third)}
    return {
        "adapter, new": Kind(lambda folder: None, save[first], _read_adapter),
        "adapter over adapter": Kind(save[first], save[second], _read_adapter),
        "AdaLoRA over LoRA": Kind(save[second], save[third], _read_adapter),
        "export over AdaLoRA": Kind(
            save[third], lambda folder: rw.export_lora(third, folder), _read_adapter
        ),
    }


def _checkpoint(method: str) -> Kind:
    trainings = PrunedTraining(method), PrunedTraining(method)
    for training, steps in zip(trainings, (50, 150), strict=True):
        for number in range(steps):
            training.step(number)
        training.random = torch.get_rng_state()
    reader = PrunedTraining(method)

    def save(training: PrunedTraining, step: int) -> Save:
        def saved(folder: Path) -> None:
            torch.set_rng_state(training.random)
            training.save(folder, step)

        return saved

    def read(folder: Path) -> object:
        return [reader.load(folder), reader.state()]

    return Kind(save(trainings[0], 50), save(trainings[1], 150), read)


def _merge(folder: Path) -> dict[str, Kind]:
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    (base / "config.json").write_text("{}")
    save_file(_plain().state_dict(), base / "model.safetensors", {"format": "pt"})
    rw.save_adapter(_adapted(rw.LoRAConfig(rank=2, target_modules=["a", "b"]), 6), adapter)

    def merged(output: Path) -> None:
        list(merge_folder(read_model_folder(base), changes_of(read_model_folder(base), adapter),
                          output))  # fmt: skip

    def read(output: Path) -> object:
        if not output.exists() or not os.listdir(output):
            return None
        return [sorted(os.listdir(output)), load_file(output / "model.safetensors")]

    return {
        "merge, new": Kind(lambda output: None, merged, read),
        "merge over an empty folder": Kind(lambda output: output.mkdir(), merged, read),
    }


def kinds(folder: Path) -> dict[str, Kind]:
    """All; `folder` is for what they merge."""
    checkpoints = {
        f"checkpoint, {method}": _checkpoint(method) for method in ("adalora", "spectral")
    }
    return _adapters() | checkpoints | _merge(folder)
