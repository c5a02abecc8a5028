# Data-parallel processes prune alike: with ties, with batches of other sizes, with NaN on one.
import torch
import torch.distributed as dist
from allocation_models import LAYERS, batch, network, trained
from processes import run_processes
from torch.nn.parallel import DistributedDataParallel

STEPS, BAD = 30, (2, 9, 15, 20)
OPTIONS = dict(total_steps=STEPS - len(BAD), final_steps=6, warmup_steps=2, allocation_interval=1)


def test_every_process_keeps_the_same_directions():
    run_processes(_trains, 2)


def _trains(rank: int) -> None:
    model, allocator = network(**OPTIONS)
    with torch.no_grad():  # directions in pairs whose scores are equal
        for name in LAYERS:
            layer = model.get_submodule(name)
            for factor in (layer.lora_A, layer.lora_B.t(), layer.lora_E):
                factor[3:] = factor[:3]
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(trained(model), 0.05)
    allocator.attach(optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = batch(2 * step + rank)
        x, y = x[: 1 + (step + rank) % 5], y[: 1 + (step + rank) % 5]
        loss = (wrapped(x) - y).square().mean()
        (loss * float("nan") if rank == 1 and step in BAD else loss).backward()
        weights = [parameter.detach().clone() for parameter in trained(model)]
        optimizer.step()
        if step in BAD:  # NaN came to both processes: both go back
            with torch.no_grad():
                for parameter, weight in zip(trained(model), weights, strict=True):
                    parameter.copy_(weight)
        everyone = [None] * 2
        mine = {name: kept.tolist() for name, kept in allocator.pattern.items()}
        dist.all_gather_object(everyone, (mine, allocator.steps, allocator.skipped_steps))
        assert everyone[0] == everyone[1], step
    assert allocator.frozen and allocator.skipped_steps == len(BAD)
    assert sum(allocator.ranks.values()) == 6
