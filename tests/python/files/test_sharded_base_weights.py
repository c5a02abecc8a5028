"""Tied ends and weights of the base in folders, of models under fully_shard over two processes."""

from pathlib import Path

import pytest
import torch
from processes import run_processes
from test_base_weights import FOLDERS, llama, output, peft_folder

import rankwise as rw

NAMES = ("tied head", "trained whole", "both trained whole")


def test_what_a_folder_has_of_the_base_is_computed_saved_and_loaded_again(tmp_path):
    for name in NAMES:
        for changed in (False, True):
            folder = tmp_path / f"{name} {changed}"
            torch.save(peft_folder(folder, *FOLDERS[name], changed=changed), folder / "output.pt")
    run_processes(_all, 2, tmp_path)


def _all(rank: int, folder: Path) -> None:
    for name in NAMES:
        for changed in (False, True):
            _computes_saves_and_loads(folder / f"{name} {changed}")
    _refuses_what_fsdp_has_in_its_books(folder / "tied head True", folder / "tied head False")


def _sharded(folder: Path) -> torch.nn.Module:
    from torch.distributed.fsdp import fully_shard

    model = llama(True)
    rw.load_adapter(model, folder)
    fully_shard(model)
    return model


def _computes_saves_and_loads(folder: Path) -> None:
    wanted = torch.load(folder / "output.pt")
    model = _sharded(folder)
    torch.testing.assert_close(output(model), wanted, rtol=0, atol=2e-6)
    assert not any("tied" in problem for problem in rw.health_check(model).problems)
    rw.save_adapter(model, folder / "ours")
    rw.load_adapter(model, folder)
    torch.testing.assert_close(output(model), wanted, rtol=0, atol=2e-6)
    again = llama(True)
    rw.load_adapter(again, folder / "ours")
    torch.testing.assert_close(output(again), wanted, rtol=0, atol=2e-6)


def _refuses_what_fsdp_has_in_its_books(changed: Path, same: Path) -> None:
    model = _sharded(changed)
    with pytest.raises(ValueError, match="disable_adapters: .*weight must be whole"):
        with rw.disable_adapters(model):
            pass
    torch.testing.assert_close(output(model), torch.load(changed / "output.pt"), rtol=0, atol=2e-6)
    model = _sharded(same)
    with pytest.raises(ValueError, match="load_adapter: .*weight must be whole.*fully_shard"):
        rw.load_adapter(model, changed)
    torch.testing.assert_close(output(model), torch.load(same / "output.pt"), rtol=0, atol=2e-6)
