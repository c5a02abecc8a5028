"""TensorBoardLog: an allocator's ranks, budget, scores and penalty in TensorBoard."""

from __future__ import annotations

import os
import weakref

from .allocator import Allocator
from .config import _is_integer, _require
from .measures import measures, scores


class TensorBoardLog:
    """Writes what an allocator does, as it does it: ``rw.TensorBoardLog("runs/first", allocator)``.

    The allocator's own steps write, so that a training loop needs no line for it, nor does a
    Trainer. Written are ``adalora/`` or ``spectral/`` with budget, mean rank, scores and penalty or
    bank, and ``rank/<module>``, at the number of optimizer steps, those with gradients that were
    not finite included. Reading them waits for the device. In a process group make it in one
    process.

    Args:
        where: a folder, or a writer with ``add_scalar(tag, value, step)``.
        allocator: a RankAllocator or SpectralAllocator, attached or not yet.
        every: steps from one writing to the next.

    Raises:
        ModuleNotFoundError: a folder was given, and tensorboard is not installed.
    """

    def __init__(
        self, where: str | os.PathLike | object, allocator: Allocator, every: int = 1
    ) -> None:
        owner = type(self).__name__
        _require(isinstance(allocator, Allocator), owner, "allocator", "an allocator", allocator)
        _require(_is_integer(every) and every > 0, owner, "every", "an integer above 0", every)
        own = isinstance(where, (str, os.PathLike))
        _require(own or hasattr(where, "add_scalar"), owner, "where", "a folder or a writer", where)
        self.writer = _writer(where) if own else where
        self._every = every
        self._handle = allocator.on_step(self._write)
        # TensorBoard's writers hold back what is new, also when the program ends.
        self._end = weakref.finalize(self, self.writer.close) if own else None

    def close(self) -> None:
        """Ends it; a writer that was given stays open."""
        self._handle.remove()
        if self._end is not None:
            self._end()

    def __enter__(self) -> TensorBoardLog:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _write(self, allocator: Allocator) -> None:
        step = allocator.steps + allocator.skipped_steps
        if step % self._every:
            return
        ranks = {f"rank/{name}": rank for name, rank in allocator.ranks.items()}
        for tag, value in (measures(allocator) | scores(allocator) | ranks).items():
            self.writer.add_scalar(tag, value, step)


def _writer(folder: str | os.PathLike):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "TensorBoardLog needs tensorboard to write into a folder: pip install tensorboard"
        ) from error
    return SummaryWriter(os.fspath(folder))
