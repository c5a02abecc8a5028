"""The order of an adapter's directions: in states of modules, and in averaged copies of a model."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ._library import library
from .devices import FACTORS
from .first_factors import FIRST, FirstFactors
from .sharding import assign, whole

Directions = library.Directions  # their order, shared with an allocator
ORDER = "lora_directions"

# Holders made by copying or unpickling others: a factor as it came, to tell who was averaged.
_COPIES: WeakKeyDictionary[Directed, Tensor] = WeakKeyDictionary()


class Directed:
    """Mixin before nn.Module of what holds an adapter's factors and its rank.

    An allocator moves an adapter's directions, or changes how many there are. So from then on that
    it may, a state_dict() has their order beside the factors, ``lora_directions``: float
    [capacity], the first place of the direction in each row, -1 in rows that are not in use.
    Loading takes factors, order and rank as they were; a state without an order is that of
    directions that were never moved.

    Args:
        directions: of adapters that an allocator may change, AdaLoRA's and those with a capacity
            above their rank; None for others.
        lora_first: what the update is counted from, of adapters that begin inside the base, as with
            PiSSA; None for others. A state has it beside the factors, or neither.
    """

    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    lora_E: nn.Parameter | None
    rank: int
    directions: Directions | None
    lora_first: FirstFactors | None

    @property
    def factors(self) -> tuple[nn.Parameter | None, ...]:
        """lora_A, lora_B and lora_E."""
        return tuple(getattr(self, factor) for factor in FACTORS)

    @property
    def lora_directions(self) -> Tensor | None:
        """The order as a state has it; setting it notes the order of factors that are there."""
        if self.directions is None:
            return None
        device = self.lora_A.device
        return self.directions.state(self.rank).to("cpu" if device.type == "meta" else device)

    @lora_directions.setter
    def lora_directions(self, state: Tensor) -> None:
        self.directions.order, self.rank = self.directions.read(state)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.directions is not None and self.directions.in_state(self.rank):
            destination[prefix + ORDER] = self.lora_directions

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
    ) -> None:
        key, count = prefix + ORDER, len(errors)
        if not self._first_fits(state_dict, prefix):
            errors.append(
                f"{prefix}{FIRST}: of the state and the model one has an adapter that begins "
                "inside the base; make both with the same first_values, and load lora_A, lora_B "
                f"and {FIRST} together"
            )
            return
        arrangement = None
        if self.directions is not None:
            try:
                arrangement = self._arrangement_in(state_dict, prefix)
            except ValueError as error:
                errors.append(f"{key}: {error}")
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected, errors
        )
        if self.directions is not None and key in unexpected:
            unexpected.remove(key)
        if arrangement is not None and len(errors) == count:
            self._arrange(*arrangement)

    def _first_fits(self, state_dict, prefix: str) -> bool:
        """Whether a state has the first factors and the trained ones together, or not at all."""
        parts = ("lora_A", "lora_B", f"{FIRST}.lora_A", f"{FIRST}.lora_B")
        found = [prefix + part in state_dict for part in parts]
        if self.lora_first is None:
            return self.lora_A is None or not any(found[2:])
        return all(found) or not any(found)

    def _arrangement_in(self, state_dict, prefix: str) -> tuple[list[int], int] | None:
        """The order and rank of the factors in a state; None where it has none."""
        here, order = (self.directions.order, self.rank), state_dict.get(prefix + ORDER)
        first = sorted(self.directions.order)
        own = [name for name, x in zip(FACTORS, self.factors, strict=True) if x is not None]
        found = [factor for factor in own if prefix + factor in state_dict]
        if order is not None:
            wanted = self.directions.read(order)
        elif not found:
            return None
        elif len(found) == len(own) or self.directions.order != first:
            wanted = (first, self.directions.first_rank)
        else:
            return None
        if wanted != here and len(found) < len(own):
            raise ValueError(
                f"the state has {found or 'no factor'} of the adapter with its directions in "
                f"another order than the model's; load {', '.join(own)} and {ORDER} together"
            )
        return wanted

    def _arrange(self, order: list[int], rank: int) -> None:
        before = self.directions.order
        self.directions.order, self.rank = order, rank
        if self in _COPIES:
            _COPIES[self] = _trace(self)
        if order != before:
            move_averages(self, before)

    def __setstate__(self, state) -> None:
        super().__setstate__(state)
        if self.directions is not None:
            _COPIES[self] = _trace(self)


def _trace(holder: Directed) -> Tensor:
    """The values of a factor that training changes from the first step on."""
    factor = holder.lora_B if holder.lora_E is None else holder.lora_E
    return factor.detach().clone()


def note_allocator(directions: Directions) -> None:
    """States of an adapter's copies get the same entries as its own."""
    for copy in _COPIES:
        if copy.directions is not None and copy.directions.origin == directions.origin:
            copy.directions.movable |= directions.movable


@torch.no_grad()
def move_averages(moved: Directed, before: list[int]) -> None:
    """Moves the directions of an adapter's averaged copies as its own were moved from `before`.

    Averages (EMA, SWA) are formed element by element, so that both must have one order. What a copy
    computes stays the same. A copy that nobody wrote since it was copied is none, nor is one that
    trains or has an allocator of its own.
    """
    after = moved.directions.order
    for copy in averages_of(moved.directions):
        if copy.directions.order != before:
            continue
        rows = torch.tensor([before.index(direction) for direction in after])
        for parameter, dim in zip(copy.factors, (0, 1, 0), strict=True):
            if parameter is not None:
                values = whole(parameter)
                assign(parameter, values.index_select(dim, rows.to(values.device)))
        copy.directions.order = after


def averages_of(directions: Directions) -> list[Directed]:
    """Copies of an adapter that are averages of it; see move_averages."""
    return [
        copy
        for copy, copied in list(_COPIES.items())
        if copy.directions is not None
        and copy.directions.origin == directions.origin
        and not copy.directions.allocated
        and _was_averaged(copy, copied)
    ]


def _was_averaged(copy: Directed, copied: Tensor) -> bool:
    factors = [factor for factor in copy.factors if factor is not None]
    if any(factor.is_meta or factor.grad is not None for factor in factors):
        return False
    now, then = (whole(x).double().cpu() for x in (_trace(copy), copied))
    return not torch.equal(now, then)
