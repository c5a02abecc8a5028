"""What an allocator asks of optimizers, and what runs it after their steps."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.optim import Optimizer

from .gathered import Gathered
from .sharding import is_sharded, whole
from .warned import warn

# Optimizer -> its found_inf in this round, None where it has none.
Round = dict[Optimizer, Tensor | None]


class Attachment:
    """Calls `run(round)` each time when all of the optimizers have stepped, until remove().

    The optimizers keep it alive, it keeps what it runs alive. A context manager: leaving it removes
    it. A copy is a removed one.
    """

    def __init__(self, run: Callable[[Round], None], optimizers: Sequence[Optimizer]) -> None:
        self._run = run
        self._optimizers = [weakref.ref(optimizer) for optimizer in optimizers]
        self._round: Round = {}
        self._warned = False
        self._hooks = [o.register_step_post_hook(self._after_step) for o in optimizers]

    @property
    def active(self) -> bool:
        """Whether it was not removed and an optimizer is left."""
        return bool(self._hooks) and any(optimizer() for optimizer in self._optimizers)

    def remove(self) -> None:
        """Ends it."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._run, self._round = [], None, {}

    def __reduce__(self):
        return type(self), (None, ())

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *error) -> None:
        self.remove()

    def _after_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        if optimizer in self._round:
            self._begin_anew()
        self._round[optimizer] = getattr(optimizer, "found_inf", None)
        if len(self._round) == len(self._optimizers):
            stepped, self._round = self._round, {}
            self._run(stepped)

    def _begin_anew(self) -> None:
        """Some have not stepped: a scaler leaves out steps, and a program may forget one."""
        self._round = {}
        if not self._warned:
            self._warned = True
            warn(
                "allocator: an optimizer stepped twice before another that was attached with "
                "it: the allocator waits until all have stepped"
            )


def unwrapped(optimizer: Optimizer, owner: str = "attach") -> Optimizer:
    """Without Accelerate's wrapper, which has no hooks of its own."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"{owner}: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def round_of(*optimizers: Optimizer | None) -> Round:
    return {o: getattr(o, "found_inf", None) for o in optimizers if o is not None}


# Of torch's optimizers: averages of gradients, and of their squares.
_FIRST = ("exp_avg", "momentum_buffer", "grad_avg")
_SECOND = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")


def view_of(optimizers: Round, gathered: Gathered):
    """What the C++ side asks of optimizers: their state of a parameter, found_inf, which parameters
    they hold, and the state by kind; of whole parameters in the place of sharded ones."""
    if not optimizers:
        return None, None, None, None

    @cache
    def owners() -> dict[int, Optimizer]:
        return {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]}

    def state_of(parameter: Tensor) -> list[Tensor] | None:
        """The state along a parameter's elements; None where some might be elsewhere."""
        along = along_of(parameter)
        return along if along is None else [gathered.whole(x) for x in along.values()]

    def along_of(parameter: Tensor) -> dict[str, Tensor] | None:
        parameter = gathered.original(parameter)
        optimizer = owners().get(id(parameter))
        if optimizer is None:  # none for it, or in another optimizer
            return None if parameter.requires_grad else {}
        state = optimizer.state.get(parameter, {})
        stepped = parameter.grad is not None and any(optimizer.state.values())
        if parameter.requires_grad and stepped and not state:
            return None  # under another parameter (LBFGS)
        if not all(x is None or isinstance(x, (Tensor, int, float)) for x in state.values()):
            return None
        along = {n: x for n, x in state.items() if torch.is_tensor(x) and x.dim() > 0}
        alike = all(
            x.shape == parameter.shape and is_sharded(x) == is_sharded(parameter)
            for x in along.values()
        )
        return along if alike else None

    def moments_of(parameter: Tensor) -> tuple[list[Tensor], list[Tensor]] | None:
        """The same as averages of gradients and of their squares; None where it is neither."""
        along = along_of(parameter)
        if along is None or not along.keys() <= {*_FIRST, *_SECOND}:
            return None
        return tuple(
            [gathered.whole(along[n]) for n in names if n in along] for names in (_FIRST, _SECOND)
        )

    def holds(parameter: Tensor) -> bool:
        return id(gathered.original(parameter)) in owners()

    return state_of, _any_found(list(optimizers.values())), holds, moments_of


def _any_found(found: Sequence[Tensor | None]) -> Tensor | None:
    found = [whole(x) for x in found if x is not None]
    return sum(x.to(found[0].device) for x in found) if found else None
