"""The adapters of an allocator, wherever their layers have them by now."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor, nn

from ._library import library
from .adapted import Adapted
from .devices import FACTORS
from .directions import Directed, Directions, averages_of, move_averages, note_allocator
from .gathered import Gathered, StandIns
from .sharding import check_one_mesh, is_sharded


class FollowedFactors:
    """{name: lora_A, lora_B and lora_E}: an allocator's, which others may take the place of.

    The C++ side has whole stand-ins for sharded ones.
    """

    _factors: dict[str, tuple[nn.Parameter, ...]]

    def __init__(self) -> None:
        self._stand_ins = StandIns()

    @property
    def matrices(self) -> list[Tensor]:
        """All lora_A and lora_B."""
        return [factor for A, B, _ in self._factors.values() for factor in (A, B)]

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """{name: (out, in)}"""
        return {name: (B.shape[0], A.shape[1]) for name, (A, B, _) in self._factors.items()}

    @property
    def sharded(self) -> bool:
        return any(map(is_sharded, self.matrices))

    def gathered(self, parts: tuple[str, ...] = FACTORS) -> AbstractContextManager[Gathered]:
        """Around work of the C++ side that reads or writes these parts of the adapters."""
        places = [FACTORS.index(part) for part in parts]
        held = [factors[place] for factors in self._factors.values() for place in places]
        return self._stand_ins.gathered(x for x in held if x is not None)

    @contextmanager
    def differentiable(self, core) -> Iterator[None]:
        """Around a computation of the C++ side whose gradients go to sharded lora_A and lora_B."""
        sharded, of = self._factors if self.sharded else (), self._stand_ins.of
        try:
            for name in sharded:
                A, B, E = self._factors[name]
                core.replace_factors(name, *(x.full_tensor().contiguous() for x in (A, B)), of(E))
            yield
        finally:
            for name in sharded:
                core.replace_factors(name, *map(of, self._factors[name]))

    def _take(self, core, name: str, now: tuple[nn.Parameter, ...]) -> None:
        """Goes on with these.

        Raises:
            ValueError: they have other shapes.
        """
        if any(mine is not theirs for mine, theirs in zip(self._factors[name], now, strict=True)):
            core.replace_factors(name, *map(self._stand_ins.of, now))
            self._stand_ins.forget(self._factors[name], but=now)
            self._factors[name] = now


class AllocatedAdapters(FollowedFactors):
    """{name: an adapter}: its layer, and its directions, by which it is found there.

    Copied and pickled with the layers.
    """

    def __init__(self, owner: str, layers: dict[str, Adapted]) -> None:
        super().__init__()
        self._owner, self._layers = owner, layers
        self._directions: dict[str, Directions] = {n: x.directions for n, x in layers.items()}
        self.check_sharding()
        self._factors = {name: self._holder(name).factors for name in layers}
        self._orders = self._orders_now()

    def for_library(self) -> list:
        """The adapters as the C++ side has them."""
        return [self._for_library(name) for name in self._layers]

    def note_allocator(self) -> None:
        """Once there is an allocator for them."""
        for directions in self._directions.values():
            note_allocator(directions)

    def check_sharding(self) -> dict[str, tuple[nn.Parameter, ...]]:
        """The factors there now, also of layers that were sharded after the allocator was made."""
        holders = {name: self._holder(name) for name in self._layers}
        held = {name: holder.factors for name, holder in holders.items() if holder is not None}
        check_one_mesh(
            self._owner,
            {f"{n}.{f}": x for n, own in held.items() for f, x in zip(FACTORS, own, strict=True)},
        )
        return held

    def follow(self, core) -> None:
        """Before the allocator works: takes parameters that are in the place of those it has.

        Raises:
            RuntimeError: the model was unloaded.
            ValueError: factors are sharded in part, or were replaced by others of another shape.
        """
        if any(layer.unloaded for layer in self._layers.values()):
            raise RuntimeError(
                f"{self._owner}: the model was unloaded and has no adapters; call remove() on the "
                "handle that attach() returned"
            )
        for name, factors in self.check_sharding().items():
            if all(x is None or isinstance(x, nn.Parameter) for x in factors):
                self._take(core, name, factors)

    def move_averages(self) -> None:
        """After the allocator moved directions: the layers' averaged copies follow."""
        for name, before in self._orders.items():
            holder = self._holder(name)
            if holder is not None and holder.directions.order != before:
                move_averages(holder, before)
        self._orders = self._orders_now()

    @property
    def averaged(self) -> bool:
        """Whether a copy of an adapter is an average of it."""
        return any(averages_of(directions) for directions in self._directions.values())

    def _orders_now(self) -> dict[str, list[int]]:
        return {name: directions.order for name, directions in self._directions.items()}

    def _holder(self, name: str) -> Directed | None:
        """The layer, or one of its waiting adapters; None when the adapter was deleted."""
        layer, directions = self._layers[name], self._directions[name]
        holders = (layer, *layer.adapters.values())
        return next((holder for holder in holders if holder.directions is directions), None)

    def _for_library(self, name: str):
        def set_rank(rank: int) -> None:
            holder = self._holder(name)
            if holder is not None:
                holder.rank = rank

        def rank_now() -> int:
            holder = self._holder(name)
            return -1 if holder is None else holder.rank

        holder, directions = self._holder(name), self._directions[name]
        factors = map(self._stand_ins.of, self._factors[name])
        return library.Adapter(
            name, *factors, holder.rank, set_rank, rank_now, directions, holder.options.scaling,
        )  # fmt: skip
