"""save_checkpoint and load_checkpoint: a whole training in one folder, to go on bit for bit."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from ._library import library
from .allocator import Allocator
from .files import FileError, export_lora, save_adapter
from .plain_values import copied, from_json, to_json
from .sharding import reshard, shared_outcome, whole
from .training_state import Training

_STRUCTURE, _TENSORS = "training.json", "training.safetensors"
_FORMAT = 1


def save_checkpoint(
    folder: str | os.PathLike,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    allocator: Allocator | None = None,
    scheduler=None,
    step: int = 0,
) -> None:
    """Writes a training as it stands: the adapter's folder, and beside it what it goes on from.

    The folder is that of save_adapter(), or of export_lora() where PEFT's AdaLoRA cannot hold the
    adapter. ``training.safetensors`` and ``training.json`` beside it have all that trains, the
    states of optimizer, allocator and scheduler, the step, and torch's random states (CPU and
    CUDA; not Python's and NumPy's). Atomic as a set: a process killed at any moment leaves the
    folder's old checkpoint or the new one. Nothing is pickled. Where several processes train, one
    of them saves; but a model under fully_shard all of them: they gather it, the first one writes.

    Args:
        folder: created if missing; an earlier checkpoint in it is replaced.
        model: with adapters, not merged.
        optimizer: or all of them, where several train the model.
        allocator: that runs after the optimizer's steps, if one does.
        scheduler: anything with state_dict() and load_state_dict().
        step: for the program, which gets it back.

    Raises:
        TypeError: naming what of a state is neither a tensor nor a plain value. Nothing is written.
        ValueError: the model has no adapter that can be saved; see export_lora.
        FileError: a tensor is not in memory (meta, ...), or the folder cannot be written.
    """
    reshard(model)
    training = Training("save_checkpoint", model, optimizer, allocator, scheduler)
    tensors: dict[str, Tensor] = {}
    state = {"format": _FORMAT, "step": step, **training.facts(), **training.state()}
    structure = to_json(state, "", tensors)
    beside = {
        _STRUCTURE: json.dumps(structure, indent=1, allow_nan=False).encode(),
        _TENSORS: library.format_tensors({n: whole(x) for n, x in tensors.items()}, _TENSORS),
    }
    try:
        save_adapter(model, folder, beside=beside)
    except ValueError as error:  # AdaLoRA with several initial ranks or alphas?
        try:
            export_lora(model, folder, beside=beside)
        except ValueError:
            raise error from None


def load_checkpoint(
    folder: str | os.PathLike,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    allocator: Allocator | None = None,
    scheduler=None,
) -> int:
    """Takes a training back to where save_checkpoint() was called; it goes on bit for bit.

    Make model, optimizer, allocator and scheduler as they were made for the training, in this
    process or another, and give them here; ranks that have moved since come from the checkpoint.
    All is read and checked before anything changes, and what fails later is taken back. A model
    under fully_shard all processes load; whether it was sharded when it was saved does not matter.

    Args:
        folder, model, optimizer, allocator, scheduler: as save_checkpoint.

    Returns:
        The step that was saved.

    Raises:
        FileError: the folder is no checkpoint, is damaged, or does not fit: every part and tensor
            that is missing, extra or other is listed.
        ValueError: a part refused its state. Everything is as before.
    """
    reshard(model)
    training = Training("load_checkpoint", model, optimizer, allocator, scheduler)
    with shared_outcome(training.mesh):
        state = _read(folder, training)
    before = copied(training.state())
    try:
        training.load(state)
    except BaseException:
        training.load(before)
        raise
    return state["step"]


def _read(folder: str | os.PathLike, training: Training) -> dict:
    """A state that fits the training."""
    beside = library.read_adapter(folder, [_STRUCTURE, _TENSORS]).beside
    tensors = library.parse_tensors(beside[_TENSORS], os.path.join(folder, _TENSORS))
    path = os.path.join(folder, _STRUCTURE)
    try:
        state = from_json(json.loads(beside[_STRUCTURE]), tensors)
        if state["format"] != _FORMAT:
            raise ValueError(f"format must be {_FORMAT}, got {state['format']!r}")
        problems = training.problems(state)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise FileError(
            f"{path}: not what this version's save_checkpoint writes: {error}"
        ) from error
    if problems:
        lines = "\n  ".join(problems)
        raise FileError(
            f"load_checkpoint: {os.fspath(folder)} does not fit the training:\n  {lines}"
        )
    return state
