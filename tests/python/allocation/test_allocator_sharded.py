# AdaLoRA's allocator where FSDP shards the base alone, or flattens the factors: refused by name.
import pytest
import torch
from processes import run_processes
from sharded_models import adapted, inputs, trained
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import rankwise as rw

CONFIG = rw.AdaLoRAConfig(
    initial_rank=3, target_rank=2, total_steps=9, target_modules=["up", "down"]
)


def test_flattened_factors_are_refused_and_unsharded_ones_follow():
    run_processes(_every_case, 2)


def _every_case(rank: int) -> None:
    _unsharded_factors(rank)
    for use_orig_params in (True, False):
        _flattened(rank, use_orig_params)


def _unsharded_factors(rank: int) -> None:
    """The base alone is sharded, and all processes choose alike."""
    model, reference = adapted(CONFIG), adapted(CONFIG)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), ignored_params=set(trained(model)))
    ranks = []
    for which, batches in ((model, [inputs(rank)]), (reference, [inputs(0), inputs(1)])):
        allocator = rw.RankAllocator(which, CONFIG)
        optimizer = torch.optim.SGD(trained(which), lr=0.1)
        allocator.attach(optimizer)
        for _ in range(9):
            optimizer.zero_grad()
            which(torch.cat(batches)).square().mean().backward()
            if which is model:
                for parameter in trained(model):
                    torch.distributed.all_reduce(parameter.grad, torch.distributed.ReduceOp.AVG)
            optimizer.step()
        ranks.append(allocator.ranks)
    assert ranks[0] == ranks[1] and sum(ranks[0].values()) == 4


def _flattened(rank: int, use_orig_params: bool) -> None:
    """FSDP's first form, which makes parts of one flat parameter of all matrices."""
    model = adapted(CONFIG)
    allocator = rw.RankAllocator(model, CONFIG)
    if not use_orig_params:
        model.requires_grad_(True)  # it flattens nothing else
    wrapped = FullyShardedDataParallel(
        model, use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    optimizer = torch.optim.SGD(trained(wrapped), lr=0.1)
    wrapped(inputs(rank)).sum().backward()
    with pytest.raises(ValueError, match="RankAllocator: .*up.*(matrix|freed memory)"):
        rw.RankAllocator(wrapped, CONFIG)
    with pytest.raises((ValueError, RuntimeError), match="RankAllocator: .*(up.*matrix|gradient)"):
        allocator.step(optimizer)
