# A tensor of every kind that torch has, and what each call of the library makes of it. A program,
# so that a crash is one of its own: it prints a line of JSON before each call and one after it.
from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.complex_tensor import ComplexTensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed._local_tensor import LocalTensor
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.masked import masked_tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.utils._expanded_weights.expanded_weights_impl import ExpandedWeight
from torch.testing._internal import common_subclass
from torch.testing._internal.custom_tensor import CustomTensorPlainOut
from torch.testing._internal.logging_tensor import LoggingTensor
from torch.testing._internal.subclasses import WrapperSubclass
from torch.testing._internal.two_tensor import TwoTensor

import rankwise as rw
from rankwise.sharding import kind_without_memory


class NoData(Tensor):
    """A wrapper that knows its values by itself, as quantised weights do."""

    @staticmethod
    def __new__(cls, values: Tensor):
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    def __init__(self, values: Tensor) -> None:
        self.values_of = values

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"NoData has no {func}")


class WithData(Tensor):
    """A subclass over memory of its own that computes as a plain tensor does."""

    @staticmethod
    def __new__(cls, values: Tensor):
        return Tensor._make_subclass(cls, values)


def fake(values: Tensor) -> Tensor:
    return FakeTensorMode(allow_non_fake_inputs=True).from_tensor(values)


def fake_of_unknown_size(values: Tensor) -> Tensor:
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False)
    return mode.from_tensor(values, static_shapes=False)


def functional(values: Tensor) -> Tensor:
    with FunctionalTensorMode():
        return FunctionalTensor.to_functional(values)


def escaped(values: Tensor) -> Tensor:
    """Of a torch.func.grad that is over."""
    level = torch._C._functorch._grad_increment_nesting()
    try:
        return torch._C._functorch._wrap_for_grad(values, level)
    finally:
        torch._C._functorch._grad_decrement_nesting()


def freed(values: Tensor) -> Tensor:
    values.untyped_storage().resize_(0)
    return values


def shards(values: Tensor) -> Tensor:
    spec = ChunkShardingSpec(0, ["rank:0/cpu"])
    return sharded_tensor.rand(spec, *values.shape)


# How one of each kind is made, and its name in messages (the first word).
WITHOUT_MEMORY: dict[str, Callable[[Tensor], Tensor]] = {
    "AsyncCollectiveTensor": AsyncCollectiveTensor,
    "CustomTensorPlainOut": lambda x: CustomTensorPlainOut(x, x),
    "FakeTensor": fake,
    "FakeTensor of unknown size": fake_of_unknown_size,
    "FunctionalTensor": functional,
    "LocalShardsWrapper": lambda x: LocalShardsWrapper([x], [(0, 0)]),
    "LocalTensor": lambda x: LocalTensor({0: x}),
    "LoggingTensor": LoggingTensor,
    "MaskedTensor": lambda x: masked_tensor(x, torch.ones_like(x, dtype=torch.bool)),
    "Mkldnn": Tensor.to_mkldnn,
    "NestedTensor": lambda x: torch.nested.nested_tensor([x], layout=torch.jagged),
    "NoData": NoData,
    "ShardedTensor": shards,
    "Sparse": Tensor.to_sparse,
    "SparseBsc": lambda x: x.to_sparse_bsc((1, 1)),
    "SparseBsr": lambda x: x.to_sparse_bsr((1, 1)),
    "SparseCsc": Tensor.to_sparse_csc,
    "SparseCsr": Tensor.to_sparse_csr,
    "TwoTensor": lambda x: TwoTensor(x, x.clone()),
    "WrapperSubclass": WrapperSubclass,
    "WrapperTensorWithCustomSizes": common_subclass.WrapperTensorWithCustomSizes,
    "WrapperTensorWithCustomStrides": common_subclass.WrapperTensorWithCustomStrides,
    "batched": lambda x: torch._C._functorch._add_batch_dim(x[None], 0, 1),
    "freed": freed,
    "function transform": escaped,
    "functional": torch._to_functional_tensor,
    "meta": lambda x: x.to("meta"),
    "nested": lambda x: torch.nested.nested_tensor([x], layout=torch.strided),
    "quantized": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    "zero": lambda x: torch._efficientzerotensor(x.shape),
}
# Those with values: what a call makes of one is what it makes of a plain tensor, or an error.
WITH_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "Buffer": nn.Buffer,
    "DTensor": lambda x: distribute_tensor(x, init_device_mesh("cpu", (1,)), [Shard(0)]),
    "NonWrapperTensor": common_subclass.NonWrapperTensor,
    "WithData": WithData,
    "expanded": lambda x: x[:1, :1].expand(x.shape),
    "negative": lambda x: torch._neg_view(-x),
    "overlapping": lambda x: x.clone().view(-1).as_strided(x.shape, (1, 1)),
    "transposed": lambda x: x.t().contiguous().t(),
}
# Those that no layer could have computed with.
OF_OTHER_TYPES: dict[str, Callable[[Tensor], Tensor]] = {
    "CausalBias": lambda x: causal_lower_right(*x.shape),
    "ComplexTensor": lambda x: ComplexTensor(x, x),
    "ExpandedWeight": lambda x: ExpandedWeight(x.requires_grad_(), 1, "sum"),
    "UninitializedParameter": lambda x: nn.UninitializedParameter(),
    "UninitializedBuffer": lambda x: nn.UninitializedBuffer(),
    "Complex": lambda x: x.to(torch.complex64).conj(),
}
PLACES = {
    "lora_A": lambda model: (model[0], "lora_A"),
    "weight": lambda model: (model[0], "weight"),
    "gradient": lambda model: (model[0], "lora_A"),
    "head": lambda model: (model[2], "weight"),
}
CONFIG = rw.AdaLoRAConfig(initial_rank=2, target_rank=1, total_steps=5, target_modules=["0"])


def adapted(triplets: bool = False, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    where = dict(target_modules=["0"], modules_to_save=["2"])
    if triplets:
        rw.apply_lora(model, replace(CONFIG, **where))
    else:
        rw.apply_lora(model, rw.LoRAConfig(rank=2, **where))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
            parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    return model


def plain(tensor: Tensor) -> Tensor:
    """A new plain tensor of the same values."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return torch.tensor(local.tolist())


def put(model: nn.Module, place: str, make: Callable[[Tensor], Tensor]) -> None:
    """Puts a tensor of the kind, made of the old one's values, into its place."""
    owner, name = PLACES[place](model)
    old = owner._parameters[name]
    if place == "gradient":
        old.grad = make(old.grad.clone())
        return
    new = owner._parameters[name] = make(old.detach().clone())
    if old.requires_grad:
        with contextlib.suppress(RuntimeError, ValueError):  # some kinds take no gradient
            new.requires_grad_()
            new.grad = make(old.grad.clone())


def saved(model: nn.Module, folder: Path, write: Callable) -> list:
    write(model, folder)
    other = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    rw.load_adapter(other, folder)
    return [p.tolist() for p in (other[0].lora_A, other[0].lora_B, other[2].weight)]


def loaded(model: nn.Module, folder: Path) -> list:
    rw.load_adapter(model, folder)
    return [plain(p).tolist() for p in (model[0].lora_A, model[0].lora_B, model[2].weight)]


def merged(model: nn.Module) -> list:
    reports = rw.merge(model)
    return [str(reports), kind_without_memory(model[0].weight) or model[0].weight.tolist()]


def allocated(model: nn.Module) -> list:
    allocator = rw.RankAllocator(model, CONFIG)
    for _ in range(3):
        allocator.step(None)
    allocator.freeze(None)
    factors = (getattr(model[0], name) for name in ("lora_A", "lora_B", "lora_E"))
    return [allocator.ranks, *(factor.tolist() for factor in factors)]


def restored(make: Callable[[Tensor], Tensor]) -> list:
    allocator = rw.RankAllocator(adapted(triplets=True), CONFIG)
    for _ in range(3):
        allocator.step(None)
    state = allocator.state_dict()
    averages = {name: make(value) for name, value in state.items() if value.dtype == torch.float32}
    allocator.load_state_dict(state | averages)
    return [str(allocator.ranks), allocator.scores.tolist(), str(len(allocator.history))]


def calls(folder: Path) -> dict[str, Callable[[nn.Module], object]]:
    return {
        "save": lambda model: saved(model, folder / "saved", rw.save_adapter),
        "export": lambda model: saved(model, folder / "exported", rw.export_lora),
        "load": lambda model: loaded(model, folder / "plain"),
        "merge": merged,
        "summary": lambda model: str(rw.summary(model)),
        "health_check": lambda model: str(rw.health_check(model)),
        "allocator": allocated,
    }


def outcome(place: str, name: str, call: Callable, make: Callable) -> dict[str, object]:
    """The call's result over a fresh model with the kind in its place, or what was raised."""
    if place != "state":
        model = adapted(triplets=name == "allocator")
        try:
            put(model, place, make)
        except Exception as error:
            return {"impossible": str(error)}  # torch takes no such tensor there
    try:
        return {"result": call(make) if place == "state" else call(model)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def subclasses(cls: type) -> set[type]:
    return {cls}.union(*map(subclasses, cls.__subclasses__()))


def left_out() -> list[str]:
    """The subclasses, in the modules imported here, that no kind is an instance of."""
    every = (
        make(torch.ones(2, 2)) for make in (WITHOUT_MEMORY | WITH_VALUES | OF_OTHER_TYPES).values()
    )
    known = {cls for one in every for cls in type(one).__mro__}
    return sorted(
        cls.__name__ for cls in subclasses(Tensor) - known if cls.__module__.startswith("torch.")
    )


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rw.save_adapter(adapted(seed=1), folder / "plain")
    every = [(place, *item) for place in PLACES for item in calls(folder).items()]
    every.append(("state", "load_state_dict", restored))
    for kind, make in (WITHOUT_MEMORY | WITH_VALUES | OF_OTHER_TYPES).items():
        for place, name, call in every:
            key = {"kind": kind, "place": place, "call": name}
            print(json.dumps(key), flush=True)
            found = outcome(place, name, call, make)
            if kind in WITH_VALUES:
                wanted = outcome(place, name, call, lambda x, make=make: plain(make(x)).to(x.dtype))
                found["wanted"] = wanted.get("result")
            print(json.dumps(key | found, default=str), flush=True)
    print(json.dumps({"left_out": left_out()}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
