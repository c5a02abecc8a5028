"""Allocations over 2 to 4 processes: no masks differ, and every injected difference is reported.

Small trainings of both allocators, one after the other, with ties, uneven batches, NaN in one
process and late processes, whose gradients are averaged. After each allocation all processes show
what they keep. In every third training one of them has another gradient in one step, or skips it:
all must raise at the next allocation, naming step, layer and process, with every tensor as it was.
"""

from __future__ import annotations

import random
import sys
import time
from argparse import ArgumentParser
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from tqdm import tqdm

TESTS = Path(__file__).resolve().parents[1] / "python"
sys.path[:0] = [str(TESTS), str(TESTS / "allocation"), str(TESTS / "checkpoint")]

from allocation_models import batch, trained  # noqa: E402
from checkpoint_trainings import same  # noqa: E402
from group_models import KINDS, made  # noqa: E402
from processes import run_processes  # noqa: E402

STEPS, FINAL = 30, 6
WORLDS = (2, 3, 4)
LATE = 0.01  # seconds at most


@dataclass
class Counts:
    trainings: int = 0
    allocations: int = 0
    mask_differences: int = 0
    injected: int = 0
    reported: int = 0
    bad_steps: int = 0
    late: int = 0


class Case:
    """What happens in one training, the same in all processes."""

    def __init__(self, number: int, world: int) -> None:
        chance = random.Random(f"{world} {number}")
        self.kind, self.seed, self.chance = KINDS[number % 2], number, chance
        self.ties = chance.random() < 0.5
        self.bad = {chance.randrange(STEPS): chance.randrange(world) for _ in range(2)}
        self.late = {chance.randrange(STEPS): chance.randrange(world) for _ in range(2)}
        injects = number % 3 == 2
        self.step = chance.randrange(STEPS - FINAL - 1) if injects else -1
        while self.step in self.bad:
            self.step = chance.randrange(STEPS - FINAL - 1)
        self.who, self.skips = chance.randrange(world), chance.random() < 0.3
        self.options = dict(
            total_steps=STEPS, final_steps=FINAL, warmup_steps=chance.randrange(3),
            allocation_interval=chance.randrange(1, 4),
        )  # fmt: skip

    def made(self):
        model, allocator = made(self.kind, **self.options)
        torch.manual_seed(self.seed)
        with torch.no_grad():
            for parameter in trained(model):
                parameter.add_(torch.randn_like(parameter) * (parameter != 0), alpha=0.1)
            for name in allocator.ranks if self.ties and self.kind == "AdaLoRA" else ():
                layer = model.get_submodule(name)
                for factor in (layer.lora_A, layer.lora_B.t(), layer.lora_E):
                    factor[3:] = factor[:3]
        return model, allocator

    def layer(self, allocator) -> str:
        """The one whose gradient differs: of those that have directions."""
        return self.chance.choice([name for name, rank in allocator.ranks.items() if rank > 0])


def backward(model, step: int, rank: int, case: Case) -> None:
    """The averaged gradients, of batches of other sizes."""
    x, y = batch(7 * step + rank)
    rows = 1 + (step + 2 * rank) % 5
    loss = (model(x[:rows]) - y[:rows]).square().mean()
    (loss * float("nan") if case.bad.get(step) == rank else loss).backward()
    gradients = [parameter.grad for parameter in trained(model)]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([x.numel() for x in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def state_of(model, allocator, optimizer) -> dict[str, torch.Tensor]:
    state = {f"model.{n}": x for n, x in model.state_dict().items() if torch.is_tensor(x)}
    state |= {f"allocator.{n}": x for n, x in allocator.state_dict().items()}
    for i, slots in optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{i}.{n}": x for n, x in slots.items() if torch.is_tensor(x)}
    return {name: value.clone() for name, value in state.items()}


def shown_alike(allocator) -> bool:
    """Whether all processes keep the same: by another way than the allocators'."""
    keeps = getattr(allocator, "pattern", None) or allocator.state_dict()
    mine = {name: value.tolist() for name, value in keeps.items()}
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, repr((mine, allocator.ranks, allocator.skipped_steps)))
    return all(one == everyone[0] for one in everyone)


def train(case: Case, rank: int, counts: Counts) -> None:
    model, allocator = case.made()
    optimizer = torch.optim.AdamW(trained(model), 0.02)
    before, layer = {}, None
    optimizer.register_step_post_hook(
        lambda *_: before.update(state_of(model, allocator, optimizer))
    )
    allocator.attach(optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(model, step, rank, case)
        if step == case.step:
            layer = case.layer(allocator)
            counts.injected += 1
            if case.who == rank:
                gradient = model.get_submodule(layer).lora_A.grad
                gradient[0, 0] = float("nan") if case.skips else gradient[0, 0] * 1.001 + 1e-9
        if case.late.get(step) == rank:
            counts.late += 1
            time.sleep(random.random() * LATE)
        weights = [parameter.detach().clone() for parameter in trained(model)]
        events = len(allocator.history)
        try:
            optimizer.step()
        except RuntimeError as error:
            apart = case.who if dist.get_world_size() > 2 else 1  # of two, that is not the first
            wanted = f"process {apart} differs, first in '"
            if step == case.step:  # later gradients differ in all layers
                wanted += f"{layer}'"
            right = ("skipped for gradients" if case.skips else wanted) in str(error)
            if (
                case.step < 0
                or not right
                or not same(before, state_of(model, allocator, optimizer))
            ):
                raise
            counts.reported += 1
            return
        if case.bad.get(step) is not None:  # NaN came to all: all go back
            counts.bad_steps += 1
            restore(model, optimizer, weights)
        elif layer is None and len(allocator.history) > events:
            counts.allocations += 1
            counts.mask_differences += not shown_alike(allocator)


def restore(model, optimizer, weights) -> None:
    with torch.no_grad():
        for parameter, weight in zip(trained(model), weights, strict=True):
            parameter.copy_(weight)
            for slot in optimizer.state[parameter].values():
                slot.zero_()


def work(rank: int, allocations: int, result: str) -> None:
    counts, world = Counts(), dist.get_world_size()
    with tqdm(total=allocations, desc=f"{world} processes", disable=rank > 0) as bar:
        while counts.allocations < allocations:
            train(Case(counts.trainings, world), rank, counts)
            counts.trainings += 1
            bar.update(counts.allocations - bar.n)
    late = torch.tensor(counts.late)
    dist.all_reduce(late)
    counts.late = late.item()
    if rank == 0:
        Path(result).write_text("\n".join(f"{k}: {v}" for k, v in asdict(counts).items()))


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--allocations", type=int, default=10_000, help="of all together")
    each = -(-parser.parse_args().allocations // len(WORLDS))
    wrong = 0
    for world in WORLDS:
        with TemporaryDirectory() as folder:
            result = Path(folder) / "counts"
            run_processes(work, world, each, str(result), seconds=3600)
            text = result.read_text()
        print(f"{world} processes\n  " + text.replace("\n", "\n  "), flush=True)
        counts = {k: int(v) for k, v in (line.split(": ") for line in text.splitlines())}
        wrong += counts["mask_differences"] + counts["injected"] - counts["reported"]
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
