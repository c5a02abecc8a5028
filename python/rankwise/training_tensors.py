"""What a training changes of a model: its adapters, all else that is trained, and its buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .adapted import is_adapter_key
from .directions import ORDER
from .model_adapters import ModelAdapters
from .sharding import assign, sharded_as
from .tree import enclosing
from .wrappers import unwrapped, without_wrappers


class TrainingTensors:
    """Their names are those in the plain model's state_dict(), whatever wraps it; each once.

    Factors are whole, as wide as an allocator may make them, and have their directions' order
    beside them. A parameter that an optimizer holds and the model does not has the name
    ``outside.N``.

    Raises:
        ValueError: the model never had adapters.
        RuntimeError: it is merged, so that its adapters are in no state.
    """

    def __init__(self, owner: str, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        adapters = ModelAdapters.of(model)
        if any(layer.merged for layer in adapters.layers.values()):
            raise RuntimeError(f"{owner}: the model is merged; call unmerge(model) first")
        self._model, self._wrapped = unwrapped(model), adapters.tree.wrapped
        held = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        copies = [copy.module for place in adapters.places for copy in place.copies.values()]
        own = {id(t) for copy in copies for t in copy.parameters()}
        self._changing = own | {id(t) for t in (*held, *self._model.buffers())}
        self._layers = adapters.layers.keys()
        known = {id(tensor) for tensor in self._state().values()}
        outside = {id(p): p for p in held if id(p) not in known}
        self._outside = {f"outside.{i}": p for i, p in enumerate(outside.values())}

    def tensors(self) -> dict[str, Tensor]:
        """Those of the model, not copies."""
        return {self._plain(key): tensor for key, tensor in self._chosen().items()} | self._outside

    def names_of(self, optimizer: Optimizer) -> list[list[str]]:
        """Of the parameters of each of its groups."""
        names = {id(tensor): name for name, tensor in self.tensors().items()}
        return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]

    def problems(self, stored: Mapping[str, Tensor]) -> list[str]:
        """What of other tensors does not fit these, in sentences."""
        here = self.tensors()
        wanted = {name for name in here if not name.endswith(f".{ORDER}")}
        given = {name for name in stored if not name.endswith(f".{ORDER}")}
        found = [f"{name}: the model has no such tensor that trains" for name in given - wanted]
        found += [f"{name}: missing in the checkpoint" for name in wanted - given]
        for name in wanted & given:
            mine, other = here[name], stored[name]
            if mine.shape != other.shape or mine.dtype != other.dtype:
                found.append(
                    f"{name}: must be {mine.dtype} {list(mine.shape)}, got {other.dtype} "
                    f"{list(other.shape)}"
                )
        return sorted(found)

    @torch.no_grad()
    def load(self, stored: Mapping[str, Tensor]) -> None:
        """Takes tensors() back, of which problems() finds none.

        Raises:
            RuntimeError: the order of an adapter's directions is none.
        """
        here = {self._plain(key): (key, tensor) for key, tensor in self._state().items()}
        inside = {}
        for name in [name for name in stored if name not in self._outside]:
            key, tensor = here.get(name, (name, stored[name]))
            inside[key] = sharded_as(tensor, stored[name])
        self._model.load_state_dict(inside, strict=False)
        for name, parameter in self._outside.items():
            assign(parameter, stored[name])

    def _state(self) -> dict[str, Tensor]:
        state = self._model.state_dict(keep_vars=True)
        return {key: value for key, value in state.items() if isinstance(value, Tensor)}

    def _chosen(self) -> dict[str, Tensor]:
        first: dict[int, str] = {}
        state = self._state()
        for key, tensor in state.items():
            changes = tensor.requires_grad or id(tensor) in self._changing
            if changes or self._of_adapter(self._plain(key)):
                first.setdefault(id(tensor), key)
        return {key: state[key] for key in first.values()}

    def _of_adapter(self, name: str) -> bool:
        layer = enclosing(name, self._layers)
        return layer is not None and is_adapter_key(name, f"{layer}.")

    def _plain(self, key: str) -> str:
        return without_wrappers(key) if self._wrapped else key
