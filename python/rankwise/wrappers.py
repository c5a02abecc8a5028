"""Modules that stand around another one (compiled, data-parallel, averaged, checkpointed) and put
parts into its names that the plain model's names do not have."""

from __future__ import annotations

from functools import cache

from torch import nn

# A wrapper's type, or a base of it, and what it calls the module inside. By type, so that a model
# with a child called "module" keeps its names; types by name, to import nothing.
WRAPPERS = {
    "deepspeed.runtime.engine.DeepSpeedEngine": "module",
    "lightning.fabric.wrappers._FabricModule": "_original_module",
    "lightning_fabric.wrappers._FabricModule": "_original_module",
    "timm.utils.model_ema.ModelEmaV2": "module",
    "timm.utils.model_ema.ModelEmaV3": "module",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.ao.quantization.stubs.QuantWrapper": "module",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper": (
        "_checkpoint_wrapped_module"
    ),
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": (
        "_fsdp_wrapped_module"
    ),
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
}
PARTS = frozenset(WRAPPERS.values())


def key_inside(module: nn.Module) -> str | None:
    """Under which key a wrapper holds the module that it stands around; None for other modules."""
    key = _key_of_type(type(module))
    return key if key in module._modules else _hidden_key(module)


@cache
def _key_of_type(kind: type) -> str | None:
    names = (f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__)
    return next((WRAPPERS[name] for name in names if name in WRAPPERS), None)


def _hidden_key(module: nn.Module) -> str | None:
    """Of a wrapper of any type, whose state_dict() is that of its only module."""
    changed = type(module).state_dict is not nn.Module.state_dict or module._state_dict_hooks
    if not changed or len(module._modules) != 1 or module._parameters or module._buffers:
        return None
    ((key, inner),) = module._modules.items()
    if inner is None:
        return None
    state = module.state_dict().keys()
    return key if state and state == inner.state_dict().keys() else None


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside of all wrappers; the module itself where there is none."""
    while (key := key_inside(module)) is not None:
        module = module._modules[key]
    return module


def put_inside(parent: nn.Module, key: str, module: nn.Module) -> None:
    """Gives a module, which may be a wrapper, another child."""
    parent._modules[key] = module
    if _key_of_type(type(parent)) == "_orig_mod":  # its forward is bound to the child it had
        parent.__setstate__(parent.__getstate__())


def without_wrappers(name: str) -> str:
    """A name without all parts that wrappers put into names."""
    return ".".join(part for part in name.split(".") if part not in PARTS)
