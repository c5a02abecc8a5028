"""Allocator: what RankAllocator and SpectralAllocator share: their optimizers and their state."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .adapted import Adapted
from .allocated import AllocatedAdapters
from .attachment import Attachment, Round, round_of, unwrapped, view_of
from .devices import FACTORS
from .installed import check_complete
from .process_group import DEFAULT, check_group, gatherer, present
from .sharding import reshard
from .tree import Tree, enclosing
from .warned import warn
from .wrappers import without_wrappers


class Allocator:
    """Changes the ranks of a model's adapters between optimizer steps.

    An adapter has one allocator at a time, which goes on with parameters that replace its own, of
    the same shapes. Copies and pickles of an allocator belong to the copied layers, and are not
    attached.

    Factors under fully_shard are gathered whole in each step, so that all processes decide alike:
    steps, freeze(), detach(), load_state_dict() and the penalty are for all of them, or none.

    Where torch.distributed has more than one process, all of a group compare what they decided: at
    the first step, at every step that may change ranks or masks, and in freeze(). All raise
    RuntimeError where it differs, naming the step, the first layer and the processes, before
    anything is changed; also where one of them has ended, or did not come within the group's
    timeout. Nothing is exchanged in other steps.
    """

    def _layers_of(self, model: nn.Module, config, triplets: bool) -> dict[str, Adapted]:
        """The layers with an active adapter, AdaLoRA's or plain LoRA's, by name."""
        owner, method = type(self).__name__, "AdaLoRA" if triplets else "LoRA"
        tree = Tree(model)
        check_complete(owner, tree)
        layers = {
            name: layer
            for name, layer in tree.adapted.items()
            if layer.adapter is not None and (layer.lora_E is not None) == triplets
        }
        if not layers:
            raise ValueError(
                f"{owner}: the model has no active {method} adapter; call "
                f"apply_lora(model, {type(config).__name__}(...)) first"
            )
        reshard(model)
        self._model = model
        return layers

    _model: nn.Module | None = None  # of layers that belong to it; a copy's stand for themselves

    def _take(self, config, adapters: AllocatedAdapters, group=DEFAULT) -> None:
        check_group(type(self).__name__, group)
        self.config, self._adapters, self._group, self._met = config, adapters, group, None
        self._core = self._new_core(config, adapters)
        adapters.note_allocator()
        self._attachment: Callable[[], Attachment | None] = lambda: None
        self._warned = False
        self._callbacks: dict[int, Callable[[Allocator], None]] = OrderedDict()

    def _new_core(self, config, adapters: AllocatedAdapters):
        """The allocator in C++."""
        raise NotImplementedError

    def _moves(self) -> object:
        """What is another value once directions have been moved."""
        raise NotImplementedError

    def _changed(self) -> None:
        """Called when they have been, and after a state was loaded."""

    def attach(self, optimizer: Optimizer, *others: Optimizer) -> Attachment:
        """Runs the allocator after each step of the optimizer, before gradients are cleared.

        Works with any torch optimizer, plain, foreach or fused, alone, under a GradScaler or in
        Accelerate's wrapper, which steps only when gradients are complete. Where several train the
        factors (LoRA+ with an optimizer for each), give them all: the allocator runs once a round,
        after the last of them.

        Returns:
            A handle whose ``remove()`` detaches the allocator.

        Raises:
            RuntimeError: it is attached already: its schedule would run at double speed. And from
                the optimizer's step, when no adapter has a gradient by then.
        """
        optimizers = [unwrapped(each) for each in (optimizer, *others)]
        if len(set(optimizers)) < len(optimizers):
            raise ValueError("attach: the same optimizer was given twice")
        if self._attached:
            gc.collect()  # an optimizer that nobody has any more may wait for it
        if self._attached:
            raise RuntimeError(
                "attach: the allocator is attached already, and twice its schedule would run at "
                "double speed. Call remove() of the first handle before; or attach(first, second) "
                "once, where two optimizers train the factors"
            )
        self._follow()
        attachment = Attachment(self._after_round, optimizers)
        self._attachment = weakref.ref(attachment)
        return attachment

    def detach(self) -> None:
        """Ends it: no optimizer runs it, and its adapters may have another allocator.

        That one has a schedule of its own over the directions that are left.
        """
        if self._attached:
            self._attachment().remove()
        with self._adapters.gathered():
            self._core.detach()

    def step(self, optimizer: Optimizer | None, *others: Optimizer) -> None:
        """One step by hand, where attach() cannot be used: after optimizer.step().

        Args:
            optimizer, others: whose state must follow the directions; None where there is none.

        Raises:
            RuntimeError: no adapter has a gradient; a state with other ranks or another order of
                directions was loaded into the model since, without this allocator's own; or another
                allocator took its adapters over. Nothing is changed.
        """
        if self._attached and not self._warned:
            self._warned = True
            warn(
                "step: the allocator is attached to an optimizer, which runs it too: with both its "
                "schedule runs at double speed"
            )
        self._run(self._core.step, round_of(optimizer, *others))

    def on_step(self, callback: Callable[[Allocator], None]) -> RemovableHandle:
        """Calls back at the end of every step, attached or by hand, skipped ones too.

        With the allocator, as the step left it. Copies and pickles leave callbacks behind.

        Returns:
            A handle whose ``remove()`` ends it.
        """
        handle = RemovableHandle(self._callbacks)
        self._callbacks[handle.id] = callback
        return handle

    @property
    def ranks(self) -> dict[str, int]:
        """{layer: directions kept by the last allocation}."""
        return dict(self._core.ranks)

    @property
    def budget(self) -> int:
        """What may be kept now: directions or parameters, as the configuration says.

        SpectralAllocator's is that of the last event.
        """
        return self._core.budget

    @property
    def schedule(self):
        """``budget(step)`` and ``allocates(step)``, for steps from 1 to total_steps."""
        return self._core.schedule

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """{layer: (out, in)}."""
        return self._adapters.sizes

    @property
    def history(self) -> list:
        """What was decided, at which step: budget, ranks and a summary of scores."""
        return self._core.history

    @property
    def steps(self) -> int:
        """Steps taken into the scores; the schedule's position."""
        return self._core.steps

    @property
    def skipped_steps(self) -> int:
        """Steps left out because gradients were not finite."""
        return self._core.skipped_steps

    @property
    def frozen(self) -> bool:
        """Whether the final directions are chosen."""
        return self._core.frozen

    def state_dict(self) -> dict[str, Tensor]:
        """All that a bit-exact resume needs besides the model's and the optimizer's state."""
        return self._core.state()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes a state_dict() back, and with it the ranks and the order of the directions.

        The model's state of the same step may be loaded before or after.

        Raises:
            ValueError: listing what differs; nothing is changed.
        """
        ranks = self.ranks

        def plain(name: str) -> str:  # a state saved under wrappers may have their parts in names
            return name if enclosing(name, ranks) is not None else without_wrappers(name)

        self._follow()
        with self._adapters.gathered():
            self._core.load_state({plain(name): tensor for name, tensor in state.items()})
        self._changed()

    def __getstate__(self) -> dict:
        return {
            "config": self.config,
            "adapters": self._adapters,
            "state": self.state_dict(),
            "group": None if self._group is None else DEFAULT,  # others belong to this process
        }

    def __setstate__(self, state: dict) -> None:
        self._take(state["config"], state["adapters"], state.get("group", DEFAULT))
        self._core.load_state(state["state"], at_work=False)

    @property
    def _attached(self) -> bool:
        attachment = self._attachment()
        return attachment is not None and attachment.active

    def _after_round(self, optimizers: Round) -> None:
        if self._core.in_charge:
            self._run(self._core.step, optimizers)

    def _join_group(self) -> None:
        """The core's group is that of now: programs may make and destroy the default one."""
        group = present(self._group)
        if group is not self._met:
            owner = type(self).__name__
            self._core.set_group(None if group is None else gatherer(owner, group))
            self._met = group

    def _follow(self) -> None:
        """Before the allocator works: with the parameters that the layers have by now."""
        if self._model is not None:
            reshard(self._model)
        self._adapters.follow(self._core)

    def _reads(self) -> tuple[str, ...]:
        """The parts of adapters that a step may read or write."""
        return FACTORS

    def _run(self, change: Callable, optimizers: Round) -> None:
        self._join_group()
        self._follow()
        before = self._moves()
        with self._adapters.gathered(self._reads()) as gathered:
            change(*view_of(optimizers, gathered))
        if self._moves() != before:
            self._changed()
        for callback in list(self._callbacks.values()):
            callback(self)
