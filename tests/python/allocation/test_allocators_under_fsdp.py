# Allocators over sharded factors, in two processes: as in one process over all batches.
from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from processes import run_processes
from sharded_models import WAYS, adapted, base, full, inputs, trained
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel

import rankwise as rw

STEPS, TARGETS = 9, ["up", "down"]
ADALORA = rw.AdaLoRAConfig(
    initial_rank=3, target_rank=2, total_steps=STEPS, final_steps=3, target_modules=TARGETS
)
ONE_DIRECTION = rw.AdaLoRAConfig(  # none of up's lora_A and lora_E in the second process
    initial_rank=3, rank_pattern={"up": 1}, target_rank=1, total_steps=STEPS, final_steps=3,
    target_modules=TARGETS,
)  # fmt: skip
MASKED = rw.AdaLoRAConfig(
    initial_rank=3, target_rank=2, total_steps=STEPS, final_steps=3, target_modules=TARGETS,
    shrink=False,
)  # fmt: skip
SPECTRAL = rw.SpectralConfig(
    initial_rank=2, max_rank=4, total_steps=STEPS, final_steps=2, allocation_interval=2, min_age=1,
    probes=1, ramp_steps=1, growth="gradient", target_modules=TARGETS,
)  # fmt: skip
GROWING = rw.SpectralConfig(
    initial_rank=0, min_rank=0, alpha=2.0, initial_budget=60, total_steps=STEPS, final_steps=1,
    min_age=1, allocation_interval=2, target_modules=TARGETS,
)  # fmt: skip
CASES = {  # configuration, way of sharding, optimizer, allocator made after it, penalty
    "AdaLoRA": (ADALORA, "root", "SGD", False, "squared_sum"),
    "AdaLoRA with an empty shard": (ONE_DIRECTION, "root", "AdamW", False, "squared_sum"),
    "AdaLoRA that masks": (MASKED, "blocks", "AdamW", True, "mean_norm"),
    "spectral": (SPECTRAL, "resharded after forward", "AdamW", True, None),
    "spectral of replicas": (SPECTRAL, "replicated", "SGD", False, None),
    "spectral from rank 0": (GROWING, "blocks", "AdamW", False, None),
}
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.03, amsgrad=True),
}


class Run:
    """A training of a model that is sharded one way, or not."""

    def __init__(self, config, way: str | None, optimizer: str, after: bool = False) -> None:
        self.model = adapted(config).double()
        adalora = isinstance(config, rw.AdaLoRAConfig)
        make = rw.RankAllocator if adalora else rw.SpectralAllocator
        if not after:
            self.allocator = make(self.model, config)
        if way is not None:
            WAYS[way](self.model, init_device_mesh("cpu", (2,)))
        if after:
            self.allocator = make(self.model, config)
        self.optimizer = OPTIMIZERS[optimizer](trained(self.model))
        self.allocator.attach(self.optimizer)

    @property
    def parts(self) -> tuple:
        return self.model, self.optimizer, self.allocator

    def step(self, x: Tensor, penalty: str | None = None) -> None:
        self.optimizer.zero_grad()
        loss = self.model(x).square().mean()
        if penalty is not None:
            loss = loss + 0.1 * self.allocator.orthogonality_penalty(penalty)
        loss.backward()
        self.optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """Parameters, gradients, the optimizer's and the allocator's state, whole."""
        found = {}
        for name, parameter in self.model.named_parameters():
            found[name] = full(parameter)
            if parameter.grad is not None:
                found[f"{name}.grad"] = full(parameter.grad)
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"{name}.{key}"] = full(torch.as_tensor(value))
        return found | self.allocator.state_dict()


def _batch(step: int, rank: int | None) -> Tensor:
    """Of one process, or of all."""
    every = [inputs(10 * step + r).double() for r in range(2)]
    return torch.cat(every) if rank is None else every[rank]


def test_two_processes_allocate_as_one_does(tmp_path):
    run_processes(_every_case, 2, tmp_path, seconds=300)
    from peft import PeftModel  # which the processes need not import

    for name in ("adalora", "spectral"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's, of a base without a name
            model = PeftModel.from_pretrained(base().double(), tmp_path / name)
        wanted = torch.tensor(json.loads((tmp_path / f"{name}.json").read_text()))
        torch.testing.assert_close(model(_batch(0, 0)), wanted.double(), rtol=1e-5, atol=1e-6)


def _every_case(rank: int, folder: Path) -> None:
    for case, arguments in CASES.items():
        try:
            _as_one(rank, *arguments)
        except Exception as error:
            raise AssertionError(case) from error
    for name, config in {"adalora": ADALORA, "spectral": SPECTRAL}.items():
        _goes_on(rank, config, folder / name)
    _skips_what_is_not_finite(rank)
    _averages_follow(rank)
    _refuses_parts()


def _as_one(rank: int, config, way: str, optimizer: str, after: bool, penalty) -> None:
    run, reference = Run(config, way, optimizer, after), Run(config, None, optimizer)
    first = list(run.allocator.ranks.values())
    for step in range(STEPS):
        run.step(_batch(step, rank), penalty)
        reference.step(_batch(step, None), penalty)
        assert run.allocator.ranks == reference.allocator.ranks, step
        wanted = reference.tensors()
        got = run.tensors()
        assert got.keys() == wanted.keys()
        for name, value in got.items():
            torch.testing.assert_close(
                value, wanted[name], rtol=1e-9, atol=1e-10, equal_nan=True, msg=name
            )
    assert any(event.ranks != first for event in run.allocator.history)
    run.allocator.detach()


def _goes_on(rank: int, config, folder: Path) -> None:
    """Stopped in the middle, by a checkpoint and by states; and saved when it has ended."""

    def train(run: Run, steps: range) -> dict[str, Tensor]:
        for step in steps:
            run.step(_batch(step, rank))
        return run.tensors()

    run = Run(config, "root", "AdamW")
    train(run, range(5))
    with torch.no_grad():
        run.model(_batch(0, rank))  # the outermost module keeps what it gathered
    rw.save_checkpoint(folder, *run.parts, step=5)
    states = [copy.deepcopy(part.state_dict()) for part in run.parts]
    middle, end = run.tensors(), train(run, range(5, STEPS))

    def gradients_left_out(found: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value for name, value in found.items() if not name.endswith(".grad")}

    again, whole, other = (Run(config, way, "AdamW") for way in ("root", None, "root"))
    with pytest.raises(rw.FileError, match="nowhere"):
        rw.load_checkpoint(folder if rank == 0 else folder / "nowhere", *again.parts)
    for loaded in (again, whole):
        assert rw.load_checkpoint(folder, *loaded.parts) == 5
        _assert_same(gradients_left_out(loaded.tensors()), gradients_left_out(middle))
    for part, state in zip(other.parts, states, strict=True):
        part.load_state_dict(state)
    for loaded in (again, other):
        _assert_same(train(loaded, range(5, STEPS)), end)

    rw.save_adapter(run.model, folder)
    with torch.no_grad():
        output = run.model(_batch(0, 0))
    if rank == 0:
        folder.with_suffix(".json").write_text(json.dumps(output.tolist()))


def _assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        assert torch.equal(value.nan_to_num(), wanted[name].nan_to_num()), name


def _skips_what_is_not_finite(rank: int) -> None:
    """NaN in one process is in all, wherever the factor's part is that has it."""
    for config in (ADALORA, SPECTRAL):
        run = Run(config, "root", "AdamW")
        run.step(_batch(0, rank))
        before = {name: full(parameter) for name, parameter in run.model.named_parameters()}
        run.optimizer.zero_grad()
        loss = run.model(_batch(1, rank)).square().mean()
        (loss * float("nan") if rank == 1 else loss).backward()
        run.allocator._attachment().remove()
        run.allocator.step(run.optimizer)
        assert (run.allocator.steps, run.allocator.skipped_steps) == (1, 1)
        _assert_same({n: full(p) for n, p in run.model.named_parameters()}, before)


def _averages_follow(rank: int) -> None:
    run, reference = Run(ADALORA, None, "SGD"), Run(ADALORA, None, "SGD")
    averages = [AveragedModel(each.model) for each in (run, reference)]
    mesh = init_device_mesh("cpu", (2,))
    for model in (averages[0].module, run.model):
        fully_shard(model, mesh=mesh)
    run.optimizer = OPTIMIZERS["SGD"](trained(run.model))
    run.allocator.attach(run.optimizer)
    for step in range(STEPS):
        run.step(_batch(step, rank))
        reference.step(_batch(step, None))
        averages[0].update_parameters(run.model)
        averages[1].update_parameters(reference.model)
    for got, wanted in zip(averages[0].parameters(), averages[1].parameters(), strict=True):
        torch.testing.assert_close(full(got), wanted.detach(), rtol=1e-9, atol=1e-10)


def _refuses_parts() -> None:
    """Of layers that are not sharded nobody averages the gradients."""
    for config in (ADALORA, SPECTRAL):
        with pytest.raises(
            ValueError, match="up.lora_A, a DTensor over .*down.lora_A, whole.*one mesh"
        ):
            Run(config, "one layer", "SGD")
        with pytest.raises(ValueError, match="Allocator: all factors must be .*ignored_params"):
            Run(config, "one layer", "SGD", after=True)
    run = Run(ADALORA, None, "SGD")
    fully_shard(run.model.up, mesh=init_device_mesh("cpu", (2,)))
    state = run.allocator.state_dict()
    run.model(_batch(0, 0)).sum().backward()
    for action in (
        lambda: run.allocator.step(run.optimizer),
        lambda: run.allocator.freeze(run.optimizer),
        lambda: run.allocator.orthogonality_penalty(),
    ):
        with pytest.raises(ValueError, match="all factors must be sharded over one mesh, or none"):
            action()
    _assert_same(run.allocator.state_dict(), state)
