# What does not fit is named, and neither the training nor the folder is changed.
import copy
import re

import pytest
import torch
from checkpoint_trainings import Run, same
from torch import nn

import rankwise as rw
from rankwise._library import library


def refuses(run: Run, folder, *patterns: str, error=rw.FileError, parts=None) -> None:
    """load_checkpoint fails with a message that fits all patterns; all is as before."""
    before = run.state()
    with pytest.raises(error) as raised:
        rw.load_checkpoint(folder, *(parts or run.parts))
    for pattern in patterns:
        assert re.search(pattern, str(raised.value)), f"{pattern!r} is not in {raised.value}"
    assert same(run.state(), before)


@pytest.fixture
def saved(tmp_path):
    run = Run("adalora", "adamw")
    run.train(range(3))
    run.save(tmp_path / "saved", 3)
    return tmp_path / "saved"


def fresh(method="adalora", optimizer="adamw") -> Run:
    run = Run(method, optimizer, seed=99)
    run.train(range(1))
    return run


def test_missing_and_extra_parts(saved, tmp_path):
    run = fresh()
    model, optimizer, allocator, scheduler = run.parts
    none = "the checkpoint has RankAllocator, the training here none"
    refuses(run, saved, f"allocator: {none}", parts=(model, optimizer, None, scheduler))
    refuses(run, saved, "scheduler: .* OneCycleLR.* none", parts=(model, optimizer, allocator))
    refuses(run, saved, "optimizer: .* AdamW, .* AdamW, AdamW", parts=(model, [optimizer] * 2))
    rw.save_checkpoint(tmp_path / "less", model, optimizer)
    refuses(run, tmp_path / "less", "allocator: the checkpoint has none", "scheduler: .* none")


def test_other_methods_optimizers_and_ranks(saved):
    refuses(fresh("adalora", "sgd"), saved, "optimizer: the checkpoint has AdamW, .* SGD")
    refuses(fresh("lora"), saved, "allocator", "first.lora_E: the model has no such tensor")
    refuses(fresh("spectral"), saved, "RankAllocator, the training here SpectralAllocator")
    run = fresh()
    rw.add_adapter(run.model, "other", rw.LoRAConfig(rank=1, target_modules=["first"]))
    refuses(run, saved, "first.adapters.other.lora_A: missing in the checkpoint")


def test_checkpoints_of_cpp_are_for_cpp(tmp_path):
    run = fresh()
    structure = b'{"dict": [\n["format", "C++ 1"],\n["allocator", "rankwise::RankAllocator"]\n]}\n'
    beside = {"training.json": structure, "training.safetensors": library.format_tensors({}, "")}
    rw.save_adapter(run.model, tmp_path, beside=beside)
    refuses(run, tmp_path, r"training.json: .* format must be 1, got 'C\+\+ 1'")


def test_tensors_of_other_shapes(tmp_path):
    def make(rank: int):
        config = rw.LoRAConfig(rank=rank, target_modules=["0"])
        model = rw.apply_lora(nn.Sequential(nn.Linear(6, 8)), config)
        return model, torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)

    rw.save_checkpoint(tmp_path, *make(2))
    with pytest.raises(rw.FileError, match=r"0.lora_A: must be .* \[3, 6\], got .* \[2, 6\]"):
        rw.load_checkpoint(tmp_path, *make(3))


def test_parameters_in_another_order(saved):
    run = fresh()
    group = run.optimizer.param_groups[0]
    group["params"] = group["params"][::-1]
    refuses(run, saved, "optimizer: its groups must have the parameters that they had")


def test_a_part_that_refuses_late_takes_all_back(saved):
    run = fresh()
    load = run.scheduler.load_state_dict

    def refuse(state):
        run.scheduler.load_state_dict = load
        raise ValueError("not this one")

    run.scheduler.load_state_dict = refuse
    refuses(run, saved, "not this one", error=ValueError)


def test_an_allocator_of_another_schedule_takes_all_back(saved):
    run = fresh()
    run.allocator.detach()
    config = copy.copy(run.allocator.config)
    object.__setattr__(config, "total_steps", 13)
    run.allocator = rw.RankAllocator(run.model, config)
    refuses(run, saved, "total_steps|schedule", error=ValueError)


@pytest.mark.parametrize("name", ["training.json", "training.safetensors"])
def test_damaged_missing_and_other_saves_files(saved, name):
    run, content = fresh(), (saved / name).read_bytes()
    (saved / name).write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    refuses(run, saved, name, "damaged, or not of the save")
    (saved / name).unlink()
    refuses(run, saved, name, "no such file")
    (saved / name).write_bytes(content)
    run.load(saved)
    rw.save_adapter(run.model, saved)
    refuses(run, saved, "damaged, or not of the save")


def test_states_that_cannot_be_stored(saved):
    run = fresh()
    files = {path.name: path.read_bytes() for path in saved.iterdir()}
    parameter = run.optimizer.param_groups[0]["params"][0]
    for value, error, pattern in (
        (print, TypeError, r"optimizer\.0\.state\.0\.odd must be a tensor, .*builtin_function"),
        (torch.ones(2).to_sparse(), rw.FileError, r"optimizer\.0\.state\.0\.odd.* dense"),
        (torch.ones(2, dtype=torch.complex128), rw.FileError, "ComplexDouble"),
    ):
        run.optimizer.state[parameter]["odd"] = value
        with pytest.raises(error, match=pattern):
            run.save(saved, 9)
        with pytest.raises(error, match=pattern):
            run.save(saved.parent / "new", 9)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == files
    assert not (saved.parent / "new").exists()


def test_models_that_are_merged_or_plain(saved):
    run = fresh()
    rw.merge(run.model)
    with pytest.raises(RuntimeError, match="save_checkpoint: the model is merged"):
        run.save(saved, 1)
    with pytest.raises(RuntimeError, match="load_checkpoint: the model is merged"):
        run.load(saved)
    plain = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="the model has no adapters"):
        rw.save_checkpoint(saved, plain, torch.optim.SGD(plain.parameters(), 0.1))
    with pytest.raises(TypeError, match="load_checkpoint: optimizer must be a torch.optim"):
        rw.load_checkpoint(saved, run.model, run.model)
