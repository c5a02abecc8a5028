# Adapters that begin inside the base, sharded and replicated over two processes.
import pytest
import torch
from first_models import begun, loss, rows
from processes import run_processes
from sharded_models import WAYS, full, inputs
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import rankwise as rw


def test_sharded_models_train_as_whole_ones():
    run_processes(_sharded, 2)


def _begun_for_shards() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential()
    for name, sizes in (("up", (8, 7)), ("down", (7, 8)), ("head", (8, 5))):
        model.add_module(name, nn.Linear(*sizes))
    config = rw.LoRAConfig(rank=3, target_modules=["up", "down"], modules_to_save=["head"])
    return rw.apply_lora(model, config, first_values=rw.PiSSA())


def _sharded(rank: int) -> None:
    for way in WAYS:
        if way == "one layer":
            continue  # the other layers' gradients are nobody's to average
        model, reference = _begun_for_shards(), _begun_for_shards()
        with rw.disable_adapters(reference), torch.no_grad():
            untouched = reference(inputs(rank))
        WAYS[way](model, init_device_mesh("cpu", (2,)))
        x = torch.cat([inputs(r) for r in range(2)])
        tolerance = 0.02 if way == "in bfloat16" else 1e-5
        for own, batch in ((model, inputs(rank)), (reference, x)):
            optimizer = torch.optim.SGD([p for p in own.parameters() if p.requires_grad], lr=0.1)
            torch.testing.assert_close(
                own(inputs(rank)).float(), untouched, rtol=tolerance, atol=tolerance
            )
            for _ in range(3):
                optimizer.zero_grad()
                own(batch).square().mean().backward()
                optimizer.step()
        wanted = dict(reference.named_parameters())
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(
                full(parameter),
                wanted[name].detach(),
                rtol=tolerance,
                atol=tolerance,
                msg=f"{way}: {name}",
            )
        config = rw.LoRAConfig(rank=2, target_modules=["up"])
        with pytest.raises(ValueError, match="add adapters before the model is sharded"):
            rw.add_adapter(model, "b", config, first_values=rw.PiSSA())


def test_replicated_models_train_as_one():
    run_processes(_replicated, 2)


def _replicated(rank: int) -> None:
    """Two passes before one backward: the buffers are broadcast between them."""
    model, reference, parts = begun(), begun(), rows().split(15)
    for own, x in ((DistributedDataParallel(model), parts[rank]), (reference, rows())):
        optimizer = torch.optim.SGD([p for p in own.parameters() if p.requires_grad], lr=0.3)
        for _ in range(3):
            optimizer.zero_grad()
            (loss(own, x) + loss(own, x / 2)).backward()
            optimizer.step()
    for parameter, wanted in zip(model.parameters(), reference.parameters(), strict=True):
        assert (parameter - wanted).abs().max() < 1e-12
