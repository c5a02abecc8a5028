# AdaLoRA's allocator over sharded factors: refused by name before anything is done.
import pytest
import torch
from processes import run_processes
from sharded_models import WAYS, adapted, inputs, sharded, trained
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import rankwise as rw

CONFIG = rw.AdaLoRAConfig(
    initial_rank=3, target_rank=2, total_steps=9, target_modules=["up", "down"]
)


def test_sharded_factors_are_refused_on_every_process():
    run_processes(_refuses, 2)


def _refuses(rank: int) -> None:
    for way in WAYS:
        _before(way, rank)
        _after(way, rank)
    _unsharded_factors(rank)
    for use_orig_params in (True, False):
        _flattened(rank, use_orig_params)


def _refused(action) -> None:
    with pytest.raises(ValueError, match=r"RankAllocator: up.lora_A must be .* DTensor"):
        action()


def _before(way: str, rank: int) -> None:
    model = sharded(way, config=CONFIG)
    _refused(lambda: rw.RankAllocator(model, CONFIG))
    with torch.no_grad():
        model(inputs(rank))
    _refused(lambda: rw.RankAllocator(model, CONFIG))


def _after(way: str, rank: int) -> None:
    """Sharded when the allocator is there already: nothing of it or of the model changes."""
    model = adapted(CONFIG)
    allocator = rw.RankAllocator(model, CONFIG)
    state = allocator.state_dict()
    WAYS[way](model, init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    _refused(lambda: allocator.attach(optimizer))
    model(inputs(rank)).sum().backward()
    for action in (
        lambda: allocator.step(optimizer),
        lambda: allocator.freeze(optimizer),
        lambda: allocator.orthogonality_penalty(),
    ):
        _refused(action)
    after = allocator.state_dict()
    assert all(torch.equal(after[name], value) for name, value in state.items())


def _unsharded_factors(rank: int) -> None:
    """The way out of the message: the base alone is sharded, and all processes choose alike."""
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
