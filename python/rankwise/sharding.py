"""Tensors not whole in this process's memory: DTensors, FSDP1's flat ones, ZeRO-3's, subclasses."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ._library import library

SUMMON = "call it within FullyShardedDataParallel.summon_full_params(model)"
GATHER = (
    "call it on all processes, within "
    "deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0)"
)
ADD_BEFORE = (
    "add adapters before the model is sharded (fully_shard); tensor-parallel layers take none: "
    "leave them out of the plan (parallelize_module, tp_plan) or out of target_modules"
)
kind_without_memory = library.kind_without_memory  # "DTensor", "meta", ...; "" for plain memory


def _class(module: str, name: str):
    """A class for isinstance(); one whose module nobody imported has no instances."""
    return getattr(sys.modules.get(module), name, ())


def is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, _class("torch.distributed.tensor", "DTensor"))


def plain_class(module: nn.Module) -> type:
    """A module's class without the mixin that fully_shard put before it."""
    fully_sharded = _class("torch.distributed.fsdp", "FSDPModule")
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, fully_sharded))


def reshard(model: nn.Module) -> None:
    """Gives modules under fully_shard their own parameters back, which optimizers and files mean.

    Between a forward and a backward they may have gathered copies in their place.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    fully_sharded = _class("torch.distributed.fsdp", "FSDPModule")
    for module in model.modules():
        if isinstance(module, fully_sharded):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A DTensor's full value, for which all processes of its mesh must ask; others as they are."""
    if not is_sharded(tensor):
        return tensor
    return tensor.detach().to(tensor.device_mesh.device_type).full_tensor()


def wholes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The full values of DTensors, under way together; all processes must ask for all of them."""
    from torch.distributed.tensor import Replicate

    gathered = [
        x.detach()
        .to(x.device_mesh.device_type)
        .redistribute(placements=[Replicate()] * x.device_mesh.ndim, async_op=True)
        for x in tensors
    ]
    return [x.to_local().clone(memory_format=torch.contiguous_format) for x in gathered]


def sharded_as(target: Tensor, value: Tensor) -> Tensor:
    """A value that all processes have, of which each keeps the part that it has of the target."""
    if not is_sharded(target) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = target.device_mesh, target.placements
    part = distribute_tensor(value.to(mesh.device_type), mesh, placements, src_data_rank=None)
    return part.to(target.device)


def assign(target: Tensor, value: Tensor) -> None:
    """target.copy_(value); of a value that all processes have, a DTensor takes its part."""
    target.copy_(sharded_as(target, value))


def has_values(tensor: Tensor, value: Tensor) -> bool:
    """Whether a tensor has these values, rounded to its dtype; a DTensor in this process's part."""
    readable = is_sharded(tensor) or not kind_without_memory(tensor)
    if not readable or tensor.shape != value.shape:
        return False
    target = torch.empty_like(tensor, requires_grad=False)
    assign(target, value)
    local = [t.to_local() if is_sharded(t) else t for t in (target, tensor.detach())]
    return torch.equal(*local)


def check_unsharded(operation: str, tensors: Mapping[str, Tensor | None], way_out: str) -> None:
    """Refuses matrices that are sharded over processes.

    Raises:
        ValueError: naming the operation, the tensor and the way out.
    """
    check_no_dtensor(operation, tensors, way_out)
    check_matrices(operation, tensors, way_out)


def check_no_dtensor(operation: str, tensors: Mapping[str, Tensor | None], way_out: str) -> None:
    """The same of DTensors alone, whatever their placements.

    Raises:
        ValueError: naming the operation, the tensor, its placements and the way out.
    """
    for name, tensor in tensors.items():
        if tensor is not None and is_sharded(tensor):
            raise ValueError(
                f"{operation}: {name} must be whole in this process, got a DTensor "
                f"{list(tensor.shape)}, {tensor.placements} over processes; {way_out}"
            )


def check_one_mesh(operation: str, tensors: Mapping[str, Tensor | None]) -> None:
    """Refuses matrices that are sharded in part, or over several meshes, or flattened.

    Raises:
        ValueError: naming the operation and two tensors.
    """
    held = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    check_matrices(operation, held)
    meshes = {name: x.device_mesh if is_sharded(x) else None for name, x in held.items()}
    first, wanted = next(iter(meshes.items()), ("", None))
    for name, mesh in meshes.items():
        if mesh is not wanted and mesh != wanted:
            raise ValueError(
                f"{operation}: all factors must be sharded over one mesh, or none, got {first}, "
                f"{_lies(wanted)}, and {name}, {_lies(mesh)}; give all layers with adapters to "
                "fully_shard with one mesh, or leave all their factors out of it (ignored_params) "
                "and average their gradients"
            )


def _lies(mesh) -> str:
    return "whole" if mesh is None else f"a DTensor over {mesh}"


def check_gathered(
    operation: str, tensors: Mapping[str, Tensor | None], way_out: str | None = None
) -> None:
    """Refuses parameters that DeepSpeed's ZeRO-3 has partitioned: no elements are left here.

    Raises:
        ValueError: naming the operation, the tensor and the way out.
    """
    for name, tensor in tensors.items():
        if tensor is not None and getattr(tensor, "ds_numel", 0) > tensor.numel():
            raise ValueError(
                f"{operation}: {name} must be whole in this process, got {list(tensor.shape)}, "
                f"partitioned by DeepSpeed's ZeRO-3; {way_out or GATHER}"
            )


def check_matrices(
    operation: str, tensors: Mapping[str, Tensor | None], way_out: str | None = None
) -> None:
    """Refuses what FullyShardedDataParallel or ZeRO-3 made of matrices: parts of flat memory.

    Raises:
        ValueError: naming the operation, the tensor and the way out.
    """
    check_gathered(operation, tensors, way_out)
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dim() == 1:
            raise ValueError(
                f"{operation}: {name} must be a matrix, got [{tensor.numel()}], as if flattened by "
                f"FullyShardedDataParallel; {way_out or SUMMON}"
            )


def check_not_flat(operation: str, model: nn.Module) -> None:
    """Refuses a model whose parameters are no longer there, but one flat parameter for them all.

    Raises:
        ValueError: naming the operation and the way out.
    """
    flat = _class("torch.distributed.fsdp._flat_param", "FlatParameter")
    if any(isinstance(parameter, flat) for parameter in model.parameters()):
        raise ValueError(
            f"{operation}: the model is under FullyShardedDataParallel and has a FlatParameter in "
            "place of its own; wrap it with use_orig_params=True"
        )


@contextmanager
def naming(operation: str, tensors: Mapping[str, Tensor | None]) -> Iterator[None]:
    """Adds to what torch says of tensors that are not plain memory which they are.

    Raises:
        RuntimeError: at once for those that torch itself would read at a wrong address.
    """
    kinds = {n: kind_without_memory(t) for n, t in tensors.items() if t is not None}
    what = ", ".join(f"{name} is {kind}" for name, kind in kinds.items() if kind)
    if "freed memory" in kinds.values():
        raise RuntimeError(f"{operation}: {what}, whose values are elsewhere now")
    try:
        yield
    except Exception as error:
        if not what:
            raise
        raise RuntimeError(f"{operation}: {what}: {error}") from error


def mesh_of(tensors: Iterable[Tensor]):
    """The largest mesh that a tensor is sharded over, or None."""
    meshes = [tensor.device_mesh for tensor in tensors if is_sharded(tensor)]
    return max(meshes, key=lambda mesh: mesh.size(), default=None)


@contextmanager
def shared_outcome(mesh) -> Iterator[bool]:
    """Runs the block on all processes of a mesh, which wait for each other at its end.

    What fails on one of them is raised on all. True on the mesh's first process, and where there is
    no mesh; the block itself must not communicate.
    """
    if mesh is None:
        yield True
        return
    failure: Exception | None = None
    try:
        yield not any(mesh.get_coordinate())
    except Exception as error:
        failure = error
    failures = [None if failure is None else (type(failure), str(failure))]
    for dim in range(mesh.ndim):
        group = mesh.get_group(dim)
        gathered: list = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, failures, group=group)
        failures = [one for part in gathered for one in part if one is not None]
    if failure is not None:
        raise failure
    for kind, text in failures:
        raise kind(f"{text} (in another process)")
