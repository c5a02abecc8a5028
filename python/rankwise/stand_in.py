"""A module that stands in for one of another class, with its parameters, hooks and attributes."""

from __future__ import annotations

import weakref

from torch import nn


def stand_in(module: nn.Module, cls: type) -> nn.Module:
    """A module of `cls` with the parameters, hooks and attributes of `module`.

    Its containers of parameters, buffers and modules are its own; hooks are shared, so that their
    handles still work. What module.compile() made is left out: it would go on to compute the old
    module.
    """
    other = cls.__new__(cls)
    own = ("_parameters", "_buffers", "_modules", "_load_state_dict_post_hooks")
    for name, value in module.__getstate__().items():
        other.__dict__[name] = value.copy() if name in own else value
    return other


def adopt_hooks(module: nn.Module) -> None:
    """Once it has the other's place: load_state_dict hooks that are given a module get this one."""
    for hook in module._load_state_dict_pre_hooks.values():
        if getattr(hook, "with_module", False):  # PyTorch's wrapper, with a weak reference
            hook.module = weakref.ref(module)
