"""The parts of a training as one state: model, optimizers, allocator, scheduler, random numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .allocator import Allocator
from .attachment import unwrapped
from .sharding import mesh_of, sharded_as
from .training_tensors import TrainingTensors


class Training:
    """What goes on together; nothing of it is copied.

    Raises:
        TypeError: an optimizer is none.
        ValueError, RuntimeError: see TrainingTensors.
    """

    def __init__(
        self,
        owner: str,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        allocator: Allocator | None,
        scheduler,
    ) -> None:
        optimizers = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
        self._optimizers = [unwrapped(each, owner) for each in optimizers]
        self._model = TrainingTensors(owner, model, self._optimizers)
        while hasattr(scheduler, "scheduler"):  # Accelerate's wrapper
            scheduler = scheduler.scheduler
        self._others = {"allocator": allocator, "scheduler": scheduler}

    def facts(self) -> dict:
        """What must be the same for a state to fit: classes, and names of parameters."""
        kinds = {part: _kinds(x) for part, x in self._others.items()}
        return {
            "kinds": {"optimizer": _kinds(*self._optimizers)} | kinds,
            "parameters": [self._model.names_of(each) for each in self._optimizers],
        }

    @property
    def mesh(self):
        """The processes that the model is sharded over, or None."""
        return mesh_of(self._model.tensors().values())

    def state(self) -> dict:
        """All that changes."""
        states = {p: None if x is None else x.state_dict() for p, x in self._others.items()}
        return {
            "model": self._model.tensors(),
            "optimizer": [each.state_dict() for each in self._optimizers],
            "random": _random_state(),
        } | states

    def problems(self, state: dict) -> list[str]:
        """What of a state with its facts does not fit, in sentences."""
        here = self.facts()
        found = [
            f"{part}: the checkpoint has {state['kinds'][part]}, the training here {kind}"
            for part, kind in here["kinds"].items()
            if state["kinds"][part] != kind
        ]
        if not found and here["parameters"] != state["parameters"]:
            found.append(
                "optimizer: its groups must have the parameters that they had, in the same order"
            )
        return found + self._model.problems(state["model"])

    def load(self, state: dict) -> None:
        """Takes a state() back in which problems() finds none. Where it fails, parts are loaded."""
        self._model.load(state["model"])
        for optimizer, stored in zip(self._optimizers, state["optimizer"], strict=True):
            _load_optimizer(optimizer, stored)
        for part, x in self._others.items():
            if x is not None:
                x.load_state_dict(state[part])
        _set_random_state(state["random"])


def _kinds(*parts) -> str:
    return ", ".join("none" if x is None else type(x).__name__ for x in parts)


def _load_optimizer(optimizer: Optimizer, stored: dict) -> None:
    optimizer.load_state_dict(stored)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [i for group in stored["param_groups"] for i in group["params"]]
    for index, parameter in zip(indices, parameters, strict=True):
        if index in stored["state"]:
            loaded = optimizer.state[parameter]
            whole = _unchanged(stored["state"][index], loaded)
            optimizer.state[parameter] = {k: _part(x, parameter) for k, x in whole.items()}


def _part(value, parameter: Tensor):
    """What a process has of a state along the elements of a sharded parameter."""
    along = isinstance(value, Tensor) and value.shape == parameter.shape
    return sharded_as(parameter, value) if along else value


def _unchanged(stored, loaded):
    """What was stored, where it was put: loading rounds it to the parameter's dtype."""
    if isinstance(stored, Tensor) and isinstance(loaded, Tensor):
        return loaded if loaded.dtype == stored.dtype else stored.to(loaded.device)
    if isinstance(stored, dict) and isinstance(loaded, dict):
        return {k: _unchanged(stored[k], x) if k in stored else x for k, x in loaded.items()}
    if type(stored) in (list, tuple) and type(stored) is type(loaded):
        return type(stored)(map(_unchanged, stored, loaded))
    return stored


def _random_state() -> dict:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict) -> None:
    torch.set_rng_state(state["cpu"])
    for device, stored in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(stored, device)
