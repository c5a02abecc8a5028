# Models under fully_shard, on two processes: training, the reports, and what is refused by name.
from pathlib import Path

import pytest
import torch
from processes import run_processes
from sharded_models import WAYS, adapted, base, full, inputs, sharded, trained
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import rankwise as rw


def test_a_sharded_model_trains_and_tells_as_a_whole_one():
    run_processes(_every_way, 2)


def _every_way(rank: int) -> None:
    for way in WAYS:
        _trains(way, rank)
        _reports(way, rank)
        _refuses(way, rank)
    _computes_its_base(rank)
    _notices_a_lost_merge(rank)
    _takes_no_adapters(rank)
    _tensor_parallel_layers_take_none(rank)
    _adapters_beside_tensor_parallel_layers(rank)


def _step(model: nn.Module, optimizer, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def _trains(way: str, rank: int) -> None:
    """Sharded over two batches as in one process over both."""
    if way == "one layer":
        return  # the other layers' gradients are nobody's to average
    model, reference = sharded(way), adapted()
    optimizers = [torch.optim.SGD(trained(m), lr=0.1) for m in (model, reference)]
    for step in range(3):
        _step(model, optimizers[0], inputs(10 * step + rank))
        _step(reference, optimizers[1], torch.cat([inputs(10 * step + r) for r in range(2)]))
    tolerance = 0.02 if way == "in bfloat16" else 1e-5
    wanted = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            full(parameter), wanted[name].detach(), rtol=tolerance, atol=tolerance, msg=name
        )


def _reports(way: str, rank: int) -> None:
    model = sharded(way)
    wanted = rw.summary(adapted())
    assert rw.summary(model) == wanted
    with torch.no_grad():
        model(inputs(rank))  # the outermost module keeps what it gathered
    assert rw.summary(model) == wanted
    assert "no gradient" in str(rw.health_check(model))
    model(inputs(rank)).square().mean().backward()
    assert rw.summary(model) == wanted
    report = rw.health_check(model)
    assert report.ok and report.checked == 2, report
    gradient = model.up.lora_B.grad.to_local()
    if rank == 1 or way == "replicated":  # there both processes have it, as after a backward
        gradient[-1, -1] = torch.inf
    assert rw.health_check(model).problems == ["up.lora_B: the gradient is not finite"]


def _refuses(way: str, rank: int) -> None:
    model = adapted()
    rw.add_adapter(model, "other", rw.LoRAConfig(rank=2, target_modules=["up"]))
    WAYS[way](model, init_device_mesh("cpu", (2,)))
    before = {name: full(p) for name, p in model.named_parameters()}
    with torch.no_grad():
        wanted = model(inputs(rank))
    with pytest.raises(ValueError, match="up: merge: weight must be whole .* DTensor"):
        rw.merge(model)
    for change in (
        lambda: rw.activate_adapter(model, "other"),
        lambda: rw.activate_adapter(model, None),
        lambda: rw.delete_adapter(model, "default"),
        lambda: rw.load_adapter(model, "nowhere", name="other"),
    ):
        with pytest.raises(
            (ValueError, rw.FileError), match="DTensor.*before the model is|nowhere"
        ):
            change()
    with torch.no_grad():
        assert torch.equal(model(inputs(rank)), wanted)
    if way != "one layer":
        model.reshard()
    for name, parameter in model.named_parameters():
        assert torch.equal(full(parameter), before[name]), name


def _computes_its_base(rank: int) -> None:
    model, reference = sharded("blocks"), adapted()
    with torch.no_grad():
        wanted = reference(inputs(rank))
        with rw.disable_adapters(model), rw.disable_adapters(reference):
            torch.testing.assert_close(model(inputs(rank)), reference(inputs(rank)))
        torch.testing.assert_close(model(inputs(rank)), wanted)


def _notices_a_lost_merge(rank: int) -> None:
    """Of one layer, merged while FSDP had whole weights in place; it puts its own back."""
    model = sharded("root").eval()
    with torch.no_grad():
        wanted = model(inputs(rank))
        model.up.merge()
        torch.testing.assert_close(model(inputs(rank)), wanted)
        model.reshard()
        with pytest.raises(RuntimeError, match="the base is back .* FSDP .* call unmerge"):
            model(inputs(rank))
        model.up.unmerge()
        assert torch.equal(model(inputs(rank)), wanted)


def _takes_no_adapters(rank: int) -> None:
    for way in ("root", "one layer"):
        for gathered in (False, True):
            model = nn.Sequential()
            for name in ("up", "down", "head"):
                model.add_module(name, nn.Linear(8, 8))
            modules = dict(model.named_modules())
            WAYS[way](model, init_device_mesh("cpu", (2,)))
            if gathered:
                model(inputs(rank))
            with pytest.raises(ValueError, match="before the model is sharded|FSDPLinear"):
                rw.apply_lora(model, rw.LoRAConfig(rank=2, target_modules=["up"]))
            assert dict(model.named_modules()) == modules


HIDDEN = 6  # which two processes can halve
PLAN = {"up": ColwiseParallel, "down": RowwiseParallel}


def _parallel(model: nn.Module, *names: str) -> nn.Module:
    plan = {name: PLAN[name]() for name in names}
    return parallelize_module(model, init_device_mesh("cpu", (2,)), plan)


def _tensor_parallel_layers_take_none(rank: int) -> None:
    config = rw.LoRAConfig(rank=2, target_modules=["up", "down"])
    model = _parallel(base(HIDDEN), "up", "down")
    wanted = model(inputs(0))
    with pytest.raises(ValueError, match=r"up: adapter: .* DTensor .*Shard\(dim=0\).*tp_plan"):
        rw.apply_lora(model, config)
    assert torch.equal(model(inputs(0)), wanted)
    torch.testing.assert_close(wanted, base(HIDDEN)(inputs(0)))

    model = _parallel(
        adapted(config, HIDDEN), "up"
    )  # afterwards: nothing computes with parts of factors
    for mode in (torch.enable_grad(), torch.no_grad()):
        with mode, pytest.raises(ValueError, match="LoRALinear: .* DTensor .* leave them out of"):
            model(inputs(0))
    with pytest.raises(ValueError, match="up: merge: weight must be whole .* DTensor"):
        rw.merge(model)
    layer = sharded("root").up
    with pytest.raises(ValueError, match="under fully_shard call the module that it was given"):
        layer(inputs(0))


def _adapters_beside_tensor_parallel_layers(rank: int) -> None:
    """The way out: plain layers train as in one process, on what the others give them whole."""
    config = rw.LoRAConfig(rank=2, target_modules=["head"])
    whole = adapted(config, HIDDEN)
    model = rw.apply_lora(_parallel(base(HIDDEN), "up", "down"), config)
    with torch.no_grad():
        for parameter, value in zip(trained(model), trained(whole), strict=True):
            parameter.copy_(value)
    for which in (model, whole):
        which(inputs(0)).square().mean().backward()
    for parameter, value in zip(trained(model), trained(whole), strict=True):
        torch.testing.assert_close(parameter.grad, value.grad)


def test_what_is_flattened_is_refused_by_name(tmp_path):
    rw.save_adapter(adapted(), tmp_path / "plain")
    run_processes(_every_flattened, 2, tmp_path)


def _every_flattened(rank: int, folder: Path) -> None:
    for use_orig_params in (True, False):
        _flattened(rank, folder, use_orig_params)


def _flattened(rank: int, folder: Path, use_orig_params: bool) -> None:
    """FSDP's first form, which makes parts of one flat parameter of all matrices."""
    model = adapted()
    if not use_orig_params:
        model.requires_grad_(True)  # it flattens nothing else
    wrapped = FullyShardedDataParallel(
        model, use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    wrapped(inputs(rank)).sum().backward()
    for action in (
        lambda: rw.summary(wrapped),
        lambda: rw.health_check(wrapped),
        lambda: rw.merge(wrapped),
        lambda: rw.save_adapter(model, folder / "sharded"),
        lambda: rw.export_lora(model, folder / "sharded"),
        lambda: rw.load_adapter(model, folder / "plain"),
    ):
        with pytest.raises((ValueError, RuntimeError, rw.FileError), match="up|down|FlatParam"):
            action()
    with FullyShardedDataParallel.summon_full_params(wrapped):
        rw.save_adapter(model, folder / f"{rank} {use_orig_params}")
    got = (folder / f"{rank} {use_orig_params}" / "adapter_model.safetensors").read_bytes()
    assert got == (folder / "plain" / "adapter_model.safetensors").read_bytes()
