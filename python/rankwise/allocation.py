"""RankAllocator: AdaLoRA's pruning between optimizer steps, attached to a torch optimizer."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn
from torch.optim import Optimizer

from ._library import library
from .allocated import AllocatedAdapters
from .allocator import Allocator
from .attachment import round_of
from .config import AdaLoRAConfig
from .late_gradients import late
from .process_group import DEFAULT

PENALTY_FORMS = ("squared_sum", "mean_norm")


class RankAllocator(Allocator):
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
        group: the torch.distributed process group whose processes train this model together and
            must decide alike; "default" for the default one, where it has several processes; None
            for a process that trains on its own. Of a pipeline's stages or a tensor's parts, which
            have adapters of their own, give the group of those that have the same.

    Raises:
        ValueError: the model has no AdaLoRA adapters, their factors are sharded in part or
            flattened, an option is wrong, or an adapter has an allocator that has made steps; one
            that has made none gives way to this.
    """

    def __init__(self, model: nn.Module, config: AdaLoRAConfig, *, group=DEFAULT) -> None:
        if not isinstance(config, AdaLoRAConfig):
            raise TypeError(
                f"RankAllocator: config must be an AdaLoRAConfig, got {type(config).__name__}"
            )
        layers = self._layers_of(model, config, triplets=True)
        self._take(config, AllocatedAdapters(type(self).__name__, layers), group)
        for layer in layers.values():
            layer.options = replace(layer.options, allocation=config.allocation_settings())

    def _new_core(self, config: AdaLoRAConfig, adapters: AllocatedAdapters):
        return library.RankAllocator(adapters.for_library(), config.allocation_options())

    def _moves(self) -> bool:
        return self._core.frozen

    def _reads(self) -> tuple[str, ...]:
        return ("lora_E",) if self.frozen else super()._reads()

    def _changed(self) -> None:
        self._adapters.move_averages()

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
        self._follow()
        with self._adapters.differentiable(self._core):
            penalty = self._core.orthogonality_penalty(squared=form == "squared_sum")
        factors = self._adapters.matrices
        outside = self._adapters.sharded or library.watched(factors)
        joins_late = penalty.requires_grad and outside
        return late(penalty, factors) if joins_late else penalty

    @property
    def pattern(self) -> dict[str, Tensor]:
        """{layer: bool [initial rank], which of its initial directions are kept}."""
        return dict(self._core.pattern)

    @property
    def scores(self) -> Tensor | None:
        """The scores of all directions, layer after layer, float64; None once frozen."""
        return self._core.scores

    def __repr__(self) -> str:
        phase = (
            "frozen" if self.frozen else f"budget {self.budget} of {self.schedule.initial_budget}"
        )
        return f"RankAllocator({len(self.ranks)} adapters, step {self.steps}, {phase})"
