"""Modules trained whole in float32 over a 16-bit base, which take and give what the base's do."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import NARROW
from .tree import Tree

_BASE = "_base_dtype"  # an empty buffer of the base's dtype, which a move of the model reaches


def mark(module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Notes the dtype of the base, in the base's module and all that stand for it alike.

    Alike, for DistributedDataParallel counts buffers.

    Args:
        module: 16-bit in part or whole.
        dtype: for one that is in float32 already.
    """
    for own in module.modules():
        noted = _narrow_dtype(own) or (dtype if _own_floats(own) else None)
        if noted is not None and _BASE not in own._buffers:
            empty = torch.empty(0, dtype=noted, device=_own_floats(own)[0].device)
            own.register_buffer(_BASE, empty, persistent=False)


def widen(module: nn.Module) -> None:
    """Makes a marked module's 16-bit tensors float32 for the optimizer; callers need not know.

    Outside of autocast inputs are widened and outputs rounded to the base's dtype.
    """
    inside: set[nn.Module] = set()
    for own in module.modules():
        for tensor in _own_floats(own):
            if tensor.dtype in NARROW:
                tensor.data = tensor.data.float()
        if _BASE in own._buffers and own not in inside:
            own.register_forward_pre_hook(_take, with_kwargs=True)
            own.register_forward_hook(_give)
            inside.update(own.modules())


def make_plain(module: nn.Module) -> None:
    """Takes away what mark() and widen() put there, and rounds what was widened."""
    for own in module.modules():
        base = own._buffers.get(_BASE)
        if base is None:
            continue
        for tensor in _own_floats(own) if _is_wide(own) else ():
            tensor.data = tensor.data.to(base.dtype)
        delattr(own, _BASE)
        for hooks in (own._forward_pre_hooks, own._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in (_take, _give)]:
                del hooks[key]
                own._forward_pre_hooks_with_kwargs.pop(key, None)


def own_dtypes(module: nn.Module) -> dict[str, torch.dtype]:
    """{submodule: dtype of its own tensors, that of the base for those in float32 over it}."""
    dtypes = {}
    for name, own in Tree(module).modules.items():
        for tensor in _own_floats(own)[:1]:
            base = own._buffers.get(_BASE)
            dtypes[name] = (tensor if base is None else base).dtype
    return dtypes


def base_dtype(module: nn.Module) -> torch.dtype | None:
    """The 16-bit dtype of the base that a module in float32 stands for, or None."""
    found = {own._buffers[_BASE].dtype for own in module.modules() if _BASE in own._buffers}
    narrow = found.intersection(NARROW)
    return narrow.pop() if len(narrow) == 1 else None


def _own_floats(module: nn.Module) -> list[Tensor]:
    buffers = [tensor for name, tensor in module._buffers.items() if name != _BASE]
    tensors = [*module._parameters.values(), *buffers]
    return [t for t in tensors if t is not None and t.is_floating_point()]


def _narrow_dtype(module: nn.Module) -> torch.dtype | None:
    return next((t.dtype for t in _own_floats(module) if t.dtype in NARROW), None)


def _is_wide(module: nn.Module) -> bool:
    """Whether tensors are in float32 still, and the base in 16 bits."""
    return getattr(module, _BASE).dtype in NARROW and _narrow_dtype(module) is None


def _take(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    if not _is_wide(module) or _autocast(module):
        return None
    return _cast(args, NARROW, torch.float32), _cast(kwargs, NARROW, torch.float32)


def _give(module: nn.Module, args: tuple, output):
    looks_up = isinstance(module, (nn.Embedding, nn.EmbeddingBag))  # which autocast leaves alone
    if not _is_wide(module) or (_autocast(module) and not looks_up):
        return None
    return _cast(output, (torch.float32,), getattr(module, _BASE).dtype)


def _autocast(module: nn.Module) -> bool:
    kind = getattr(module, _BASE).device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def _cast(value, wanted: tuple[torch.dtype, ...], dtype: torch.dtype):
    """The tensors of the wanted dtypes cast, also in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.dtype in wanted else value
    if type(value) in (tuple, list):
        return type(value)(_cast(item, wanted, dtype) for item in value)
    if type(value) is dict:
        return {name: _cast(item, wanted, dtype) for name, item in value.items()}
    return value
