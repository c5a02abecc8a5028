"""Adapters of models under fully_shard, saved and loaded by two processes together."""

import os
from pathlib import Path

import pytest
import torch
from processes import run_processes
from sharded_models import WAYS, adapted, full, inputs, sharded, trained

import rankwise as rw


def test_two_processes_save_and_load_as_one_does(tmp_path):
    rw.save_adapter(adapted(), tmp_path / "one")
    rw.export_lora(adapted(), tmp_path / "one exported")
    run_processes(_save_and_load, 2, tmp_path)


def _save_and_load(rank: int, folder: Path) -> None:
    for way in WAYS:
        _saves(way, folder)
        _saves_after_a_forward(way, rank, folder)
        _loads(way, folder)
    _saves_a_lowered_rank(rank, folder)
    _fails_everywhere(rank, folder)


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _saves(way: str, folder: Path) -> None:
    model = sharded(way)
    rw.save_adapter(model, folder / way)
    assert _content(folder / way) == _content(folder / "one")  # also in the process that waited
    rw.export_lora(model, folder / f"{way} exported")
    assert _content(folder / f"{way} exported") == _content(folder / "one exported")


def _saves_after_a_forward(way: str, rank: int, folder: Path) -> None:
    model = sharded(way)
    with torch.no_grad():
        model(inputs(rank))  # the outermost module keeps what it gathered
    rw.save_adapter(model, folder / f"{way} after")
    assert _content(folder / f"{way} after") == _content(folder / "one")
    model(inputs(rank)).sum().backward()
    assert all(parameter.grad is not None for parameter in trained(model))


def _loads(way: str, folder: Path) -> None:
    model = sharded(way)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        model(inputs(0))
        for parameter in trained(model):
            parameter.zero_()
    rw.load_adapter(model, folder / "one")
    wanted = dict(adapted().named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(full(parameter), wanted[name]), name
        assert parameter is parameters[name], name


def _saves_a_lowered_rank(rank: int, folder: Path) -> None:
    config = rw.AdaLoRAConfig(
        initial_rank=3, target_rank=2, total_steps=9, target_modules=["up", "down"]
    )
    model = sharded("root", config=config)
    for which, name in ((adapted(config), f"lowered {rank}"), (model, "lowered")):
        which.up.rank = which.down.rank = 2
        rw.save_adapter(which, folder / name)
    assert _content(folder / "lowered") == _content(folder / f"lowered {rank}")
    rw.load_adapter(model, folder / "lowered")
    assert torch.equal(full(model.up.lora_A)[:2], adapted(config).up.lora_A[:2])
    assert not full(model.up.lora_A)[2:].any()


def _fails_everywhere(rank: int, folder: Path) -> None:
    """Where one process fails, none goes on without it."""
    model = sharded("root")
    (folder / "a file").write_text("")
    with pytest.raises(rw.FileError, match="a file"):
        rw.save_adapter(model, folder / "a file")
    before = [full(parameter) for parameter in model.parameters()]
    with pytest.raises(rw.FileError, match="nowhere"):
        rw.load_adapter(model, folder / ("one" if rank == 0 else "nowhere"))
    with pytest.raises(ValueError, match="down: adapter: weight .*DTensor.*before the model is"):
        rw.load_adapter(model, folder / "one", name="another")
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(full(parameter), value)
    assert rw.adapter_names(model) == ["default"]


def test_one_process_writes_alone_what_is_not_sharded(tmp_path):
    run_processes(_save_alone, 2, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["0", "1"]


def _save_alone(rank: int, folder: Path) -> None:
    model = torch.nn.parallel.DistributedDataParallel(adapted())
    rw.save_adapter(model.module, folder / str(rank))
