# DDP over two processes decides and trains as one process with all batches, group or not.
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from allocation_models import batch, trained
from group_models import KINDS, Training, made
from process_cases import failures_of
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

STEPS, WORLD = 40, 2


def _batch(step: int, micro: int, rank: int) -> tuple[Tensor, Tensor]:
    return batch(100 * step + 10 * micro + rank)


def _decisions(allocator) -> list:
    return [(x.step, x.budget, x.ranks) for x in allocator.history]


def _one_process(kind: str, micros: int) -> Training:
    training = Training(kind, group=None)
    parts = [(micro, rank) for micro in range(micros) for rank in range(WORLD)]
    for step in range(STEPS):
        every = [_batch(step, *part) for part in parts]
        training.step(*(torch.cat(tensors) for tensors in zip(*every, strict=True)))
    return training


def _accumulated_step(training: Training, wrapped, step: int, micros: int, rank: int) -> None:
    training.optimizer.zero_grad()
    for micro in range(micros):
        with wrapped.no_sync() if micro < micros - 1 else nullcontext():
            x, y = _batch(step, micro, rank)
            ((wrapped(x) - y).square().mean() / micros).backward()
    training.optimizer.step()


def _as_one(rank: int) -> None:
    for kind in KINDS:
        for micros in (1, 3):
            wanted, training = _one_process(kind, micros), Training(kind)
            wrapped = DistributedDataParallel(training.model)
            for step in range(STEPS):
                _accumulated_step(training, wrapped, step, micros, rank)
            assert _decisions(training.allocator) == _decisions(wanted.allocator), (kind, micros)
            assert training.allocator.ranks == wanted.allocator.ranks
            assert training.allocator.frozen
            for (name, got), expected in zip(
                training.model.named_parameters(), wanted.model.parameters(), strict=True
            ):
                torch.testing.assert_close(
                    got, expected, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: name + text
                )
            sums = [None] * WORLD
            mine = {n: x.tolist() for n, x in training.allocator.state_dict().items()}
            dist.all_gather_object(sums, str(mine))
            assert sums[0] == sums[1]


def test_two_processes_decide_and_train_as_one(failures):
    assert failures["_as_one"] == ""


def _uneven(rank: int) -> None:
    for kind in KINDS:
        training = Training(kind)
        wrapped = DistributedDataParallel(training.model)
        for step in range(STEPS):
            x, y = batch(2 * step + rank)
            rows = 1 + (step + 2 * rank) % 5
            training.step(x[:rows], y[:rows], model=wrapped)
        assert training.allocator.frozen and training.allocator.skipped_steps == 0


def test_uneven_batches_are_no_difference(failures):
    assert failures["_uneven"] == ""


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> dict[str, str]:
    return failures_of([_as_one, _uneven], WORLD, tmp_path_factory.mktemp("cases"))


def accelerated() -> None:
    """In each process of Accelerate's launcher."""
    from accelerate import Accelerator

    torch.set_num_threads(1)
    micros, wanted = 2, _one_process("AdaLoRA", 2)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=micros)
    model, allocator = made("AdaLoRA")
    wrapped, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained(model), 0.02))
    allocator.attach(optimizer)
    rank = accelerator.process_index
    for step in range(STEPS):
        for micro in range(micros):
            with accelerator.accumulate(wrapped):
                x, y = _batch(step, micro, rank)
                accelerator.backward((wrapped(x) - y).square().mean())
                optimizer.step()
                optimizer.zero_grad()
    assert accelerator.num_processes == WORLD
    assert _decisions(allocator) == _decisions(wanted.allocator)
    again, other = made("AdaLoRA")
    again(batch(rank)[0]).sum().backward()
    for _ in range(3):
        other.step(None)
    try:
        other.step(None)
    except RuntimeError as error:
        assert "at step 4: process 1 differs, first in 'first'" in str(error)
        print("done")


def test_accelerates_launcher():
    call = "from test_groups_under_ddp import accelerated; from accelerate import debug_launcher"
    result = subprocess.run(
        [sys.executable, "-c", f"{call}; debug_launcher(accelerated, num_processes={WORLD})"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("done") == WORLD, result.stdout + result.stderr
