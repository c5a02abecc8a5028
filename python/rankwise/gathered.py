"""Sharded factors gathered whole for an allocator, which writes back what it changes of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .sharding import assign, is_sharded, whole, wholes


class StandIns:
    """{a sharded factor: a whole one in its place}, which all processes change alike."""

    def __init__(self) -> None:
        self._of: dict[nn.Parameter, nn.Parameter] = {}

    def of(self, factor: nn.Parameter | None) -> nn.Parameter | None:
        """For the C++ side, without values yet; the factor itself where it is not sharded."""
        if factor is None or not is_sharded(factor):
            return factor
        if factor not in self._of:
            place = {"dtype": factor.dtype, "device": factor.device_mesh.device_type}
            self._of[factor] = nn.Parameter(torch.zeros(factor.shape, **place))
        return self._of[factor]

    def forget(self, factors: Sequence, but: Sequence) -> None:
        """Those of factors that are no longer anywhere, but for these."""
        for factor in factors:
            if not any(factor is kept for kept in but):
                self._of.pop(factor, None)

    @contextmanager
    def gathered(self, factors: Iterable[nn.Parameter]) -> Iterator[Gathered]:
        """Gives the stand-ins of these factors, all or none of them sharded, values and gradients.

        What the block changes of them is written back, to each process its part, also when it
        raises. All processes must be here.
        """
        pairs = {factor: self.of(factor) for factor in factors if is_sharded(factor)}
        trained = {factor: x for factor, x in pairs.items() if factor.grad is not None}
        gathered = Gathered({id(x): factor for factor, x in self._of.items()})
        with torch.no_grad():
            values = wholes([*pairs, *(factor.grad for factor in trained)])
            for factor, stand_in in pairs.items():
                gathered.note(factor, stand_in.copy_(values.pop(0)))
            for factor, stand_in in trained.items():
                stand_in.grad = gathered.note(factor.grad, values.pop(0))
        try:
            yield gathered
        finally:
            for factor, stand_in in trained.items():
                gathered.replace(factor.grad, stand_in.grad)
                stand_in.grad = None
            gathered.write_back()


class Gathered:
    """What was gathered of factors, gradients and, when it is asked for, optimizers' states.

    Args:
        originals: {id of a stand-in: its factor}.
    """

    def __init__(self, originals: dict[int, nn.Parameter] | None = None) -> None:
        self._originals = originals or {}
        self._whole: dict[Tensor, tuple[Tensor, int]] = {}  # and the version it came in

    def original(self, parameter: Tensor) -> Tensor:
        return self._originals.get(id(parameter), parameter)

    def whole(self, tensor: Tensor) -> Tensor:
        """The same each time; itself where it is not sharded."""
        if not is_sharded(tensor):
            return tensor
        return self._whole[tensor][0] if tensor in self._whole else self.note(tensor, whole(tensor))

    def note(self, tensor: Tensor, value: Tensor) -> Tensor:
        self._whole[tensor] = value, value._version
        return value

    def replace(self, tensor: Tensor, value: Tensor) -> None:
        """Another tensor may have come in the place of the one that was gathered."""
        if self._whole[tensor][0] is not value:
            self._whole[tensor] = value, -1

    @torch.no_grad()
    def write_back(self) -> None:
        for tensor, (value, version) in self._whole.items():
            if value._version != version:
                assign(tensor, value)
