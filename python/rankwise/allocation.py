"""RankAllocator: AdaLoRA's pruning between optimizer steps, attached to a torch optimizer."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor, nn
from torch.optim import Optimizer

from ._library import library
from .allocated import AllocatedAdapters
from .attachment import Attachment, Round, round_of, unwrapped, view_of
from .config import AdaLoRAConfig
from .installed import check_complete
from .late_gradients import late
from .sharding import reshard
from .tree import Tree, enclosing
from .wrappers import without_wrappers

PENALTY_FORMS = ("squared_sum", "mean_norm")


class RankAllocator:
    """Prunes a model's AdaLoRA adapters to a falling budget (arXiv 2303.10512, algorithm 1).

    After every optimizer step it averages ``|w dL/dw|`` and its uncertainty, scores each triplet
    (a row of A, an entry of E, a column of B) and, on the schedule's steps, sets E to zero for all
    but the best. A pruned direction keeps being trained and may return until the step
    ``total_steps - final_steps``; there the pattern is frozen and, with ``config.shrink``, the kept
    directions move to the front of the factors, in place, with the optimizer's state, and
    ``layer.rank`` falls: later steps compute and save only what is kept.

    Until then a step with gradients that are infinite or NaN, and always one that a fused optimizer
    left out under a GradScaler, changes nothing but ``skipped_steps``. Ties are decided by the
    order of layers and directions.

    An adapter has one allocator at a time, which goes on with parameters that replace its own, of
    the same shapes. Copies of the model that are averages of it (``torch.optim.swa_utils``, or any
    that a program updates in place) are moved along; averages that are no copies, lists or dicts of
    tensors, are not: ``config.shrink=False`` then. Copies and pickles of an allocator belong to the
    copied layers, and are not attached.

    Args:
        model: with active AdaLoRA adapters (``apply_lora(model, AdaLoRAConfig(...))``).
        config: the schedule, which the adapters note for save_adapter(); its targets are not used
            here. ``adalora_config(model)`` is that of an adapter already in the model.

    Raises:
        ValueError: the model has no AdaLoRA adapters, their factors are sharded, an option is
            wrong, or an adapter has an allocator that has made steps; one that has made none gives
            way to this.
    """

    def __init__(self, model: nn.Module, config: AdaLoRAConfig) -> None:
        if not isinstance(config, AdaLoRAConfig):
            raise TypeError(
                f"RankAllocator: config must be an AdaLoRAConfig, got {type(config).__name__}"
            )
        tree = Tree(model)
        check_complete("RankAllocator", tree)
        layers = {n: x for n, x in tree.adapted.items() if x.lora_E is not None}
        if not layers:
            raise ValueError(
                "RankAllocator: the model has no active AdaLoRA adapter; call "
                "apply_lora(model, AdaLoRAConfig(...)) first"
            )
        reshard(model)
        directions = {name: layer.directions for name, layer in layers.items()}
        self._take(config, AllocatedAdapters(layers, directions))
        for layer in layers.values():
            layer.options = replace(layer.options, allocation=config.allocation_settings())

    def _take(self, config: AdaLoRAConfig, adapters: AllocatedAdapters) -> None:
        self.config, self._adapters = config, adapters
        self._core = library.RankAllocator(adapters.for_library(), config.allocation_options())
        adapters.note_allocator()
        self._attachment: Callable[[], Attachment | None] = lambda: None
        self._warned = False

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
        self._adapters.check_unsharded()
        attachment = Attachment(self._after_round, optimizers)
        self._attachment = weakref.ref(attachment)
        return attachment

    def detach(self) -> None:
        """Ends it: no optimizer runs it, and its adapters may have another allocator.

        That one has a schedule of its own over the directions that are left.
        """
        if self._attached:
            self._attachment().remove()
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
            warnings.warn(
                "step: the allocator is attached to an optimizer, which runs it too: with both its "
                "schedule runs at double speed",
                stacklevel=2,
            )
        self._run(self._core.step, round_of(optimizer, *others))

    def freeze(self, optimizer: Optimizer | None, *others: Optimizer) -> None:
        """Chooses the final directions now, for a training that ends before its schedule.

        Args:
            optimizer, others: whose state must follow the directions; None where there is none.

        Raises:
            RuntimeError: as step().
        """
        self._run(self._core.freeze, round_of(optimizer, *others))

    def orthogonality_penalty(self, form: str = "squared_sum") -> Tensor:
        """How far the factors are from orthonormal directions; add it, weighted, to the loss.

        With ``D = A A^T - I`` and ``B^T B - I`` over the active directions: the sum over all
        factors of ``||D||_F^2`` ("squared_sum", the paper's equation 4) or the mean of ``||D||_F``
        ("mean_norm", the paper's code and PEFT).

        Returns:
            A 0-d tensor, one autograd node over all factors. In a model under
            DistributedDataParallel its gradients join the others when the backward pass ends, for
            DDP knows only those of the forward pass. So they are not averaged over the processes,
            in which they are equal.

        Raises:
            RuntimeError: a state was loaded without the allocator's own, as in step().
        """
        if form not in PENALTY_FORMS:
            raise ValueError(
                f"orthogonality_penalty: form must be in {PENALTY_FORMS}, got {form!r}"
            )
        self._adapters.follow(self._core)
        penalty = self._core.orthogonality_penalty(squared=form == "squared_sum")
        factors = self._adapters.matrices
        joins_late = penalty.requires_grad and library.watched(factors)
        return late(penalty, factors) if joins_late else penalty

    @property
    def ranks(self) -> dict[str, int]:
        """{layer: directions kept by the last allocation}."""
        return dict(self._core.ranks)

    @property
    def pattern(self) -> dict[str, Tensor]:
        """{layer: bool [initial rank], which of its initial directions are kept}."""
        return dict(self._core.pattern)

    @property
    def scores(self) -> Tensor | None:
        """The scores of all directions, layer after layer, float64; None once frozen."""
        return self._core.scores

    @property
    def schedule(self):
        """``budget(step)`` and ``allocates(step)``, for steps from 1 to total_steps."""
        return self._core.schedule

    @property
    def history(self) -> list:
        """The allocations that changed something: step, budget, ranks and a summary of scores."""
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

        self._adapters.follow(self._core)
        self._core.load_state({plain(name): tensor for name, tensor in state.items()})
        self._adapters.move_averages()

    def __getstate__(self) -> dict:
        return {"config": self.config, "adapters": self._adapters, "state": self.state_dict()}

    def __setstate__(self, state: dict) -> None:
        self._take(state["config"], state["adapters"])
        self._core.load_state(state["state"], at_work=False)

    def __repr__(self) -> str:
        budget = self.schedule.budget(self.steps)
        phase = "frozen" if self.frozen else f"budget {budget} of {self.schedule.initial_budget}"
        return f"RankAllocator({len(self.ranks)} adapters, step {self.steps}, {phase})"

    @property
    def _attached(self) -> bool:
        attachment = self._attachment()
        return attachment is not None and attachment.active

    def _after_round(self, optimizers: Round) -> None:
        if self._core.in_charge:
            self._run(self._core.step, optimizers)

    def _run(self, change: Callable, optimizers: Round) -> None:
        self._adapters.follow(self._core)
        frozen = self._core.frozen
        change(*view_of(optimizers))
        if self._core.frozen != frozen:
            self._adapters.move_averages()
