"""Plain layers again, nn.Linear, nn.Embedding and Conv1D. Whole models: plain.py."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .computed import not_a_parameter
from .devices import FACTORS
from .first_factors import FIRST
from .merging import Mergeable
from .sharding import check_unsharded
from .stand_in import adopt_hooks, stand_in

# What a plain layer has not: FACTORS, attributes, and of a Conv1D those of nn.Linear's too.
_ATTRIBUTES = (
    "transposed",
    "adapters_enabled",
    "in_merged_model",
    "adapter",
    "options",
    "rank",
    "directions",
    "shared_input",
)
_HIDDEN = ("_unmerged", "_plain_state", "_plain_class")
_OF_LINEAR = ("in_features", "out_features")


class Unloadable(Mergeable):
    """Mixin of layers whose place a plain layer can take."""

    unloaded = False  # whether one has
    _plain_class: type[nn.Module]
    _own_hooks: tuple[Callable, ...]

    def check_unload(self) -> None:
        """Raises RuntimeError or ValueError where unload() would."""
        if "forward" in vars(self):
            raise RuntimeError(
                "unload: the layer's forward was replaced on the instance (by a hook of "
                "accelerate, for example); remove that first"
            )
        parametrised = getattr(self, "parametrizations", ())
        factors = [name for name in FACTORS if getattr(self, name, None) is not None]
        for name in (*parametrised, *factors):
            found = not_a_parameter(self, name)
            if found is not None:
                raise RuntimeError(f"unload: the layer's {found}; nothing was changed")
        matrices = {name: getattr(self, name) for name in ("weight", *factors)}
        check_unsharded("unload", matrices, "load the saved adapter into a model that is not")

    def unload(self) -> nn.Module:
        """The plain layer that this one stands for, which is then not to be used any more.

        Its parameters are the same objects, ``weight`` as it is now: with the active adapter's
        update when merged, else the base's. It has the hooks, whose handles go on working, and no
        adapter.

        Raises:
            RuntimeError: a parametrisation or a forward put on the instance is in the way; nothing
                is changed.
            ValueError: a parameter is sharded; nothing is changed.
        """
        self.check_unload()
        plain = stand_in(self, self._plain_class)
        plain._load_state_dict_post_hooks = self._load_state_dict_post_hooks
        linear = () if isinstance(plain, (nn.Linear, nn.Embedding)) else _OF_LINEAR
        for name in (*_ATTRIBUTES, *_HIDDEN, *linear):
            vars(plain).pop(name, None)
        for name in FACTORS:
            del plain._parameters[name]
        for name in ("adapters", FIRST):
            del plain._modules[name]
        for hooks in (plain._forward_pre_hooks, plain._load_state_dict_post_hooks):
            for key in [key for key, hook in hooks.items() if hook in self._own_hooks]:
                del hooks[key]
        adopt_hooks(plain)
        self.unloaded = True
        return plain
