"""RankAllocator: AdaLoRA's pruning between optimizer steps, attached to a torch optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ._library import library
from .adapted import Adapted
from .config import AdaLoRAConfig
from .installed import check_complete
from .sharding import check_unsharded, reshard
from .tree import Tree, enclosing
from .wrappers import without_wrappers

_UNSHARDED = (
    "use DistributedDataParallel, or leave the factors out of fully_shard (ignored_params) and "
    "average their gradients"
)
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

    Args:
        model: with active AdaLoRA adapters (``apply_lora(model, AdaLoRAConfig(...))``).
        config: the schedule, which the adapters note for save_adapter(); its targets are not used
            here. ``adalora_config(model)`` is that of an adapter already in the model.

    Raises:
        ValueError: the model has no AdaLoRA adapters, their factors are sharded, or an option is
            wrong.
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
        self.config = config
        self._layers = layers
        reshard(model)
        self._check_unsharded()
        self._core = library.RankAllocator(
            [_adapter(name, layer) for name, layer in layers.items()], config.allocation_options()
        )
        for layer in layers.values():
            layer.options = replace(layer.options, allocation=config.allocation_settings())

    def attach(self, optimizer: Optimizer) -> RemovableHandle:
        """Runs the allocator after each step of the optimizer, before gradients are cleared.

        Works with any torch optimizer, plain, foreach or fused, alone, under a GradScaler or in
        Accelerate's wrapper, which steps only when gradients are complete.

        Returns:
            A handle whose ``remove()`` detaches the allocator.

        Raises:
            RuntimeError: from the optimizer's step, when no adapter has a gradient by then.
        """
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"attach: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        self._check_unsharded()
        while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
            optimizer = optimizer.optimizer  # Accelerate's wrapper, which has no hooks of its own
        return optimizer.register_step_post_hook(lambda stepped, args, kwargs: self.step(stepped))

    def step(self, optimizer: Optimizer | None) -> None:
        """One step by hand, where attach() cannot be used: after optimizer.step().

        Args:
            optimizer: whose state must follow the directions; None where there is none.
        """
        if any(layer.unloaded for layer in self._layers.values()):
            raise RuntimeError(
                "RankAllocator: the model was unloaded and has no adapters; call remove() on the "
                "handle that attach() returned"
            )
        self._check_unsharded()
        self._core.step(*_view(optimizer))

    def freeze(self, optimizer: Optimizer | None) -> None:
        """Chooses the final directions now, for a training that ends before its schedule.

        Args:
            optimizer: whose state must follow the directions; None where there is none.
        """
        self._check_unsharded()
        self._core.freeze(*_view(optimizer))

    def orthogonality_penalty(self, form: str = "squared_sum") -> Tensor:
        """How far the factors are from orthonormal directions; add it, weighted, to the loss.

        With ``D = A A^T - I`` and ``B^T B - I`` over the active directions: the sum over all
        factors of ``||D||_F^2`` ("squared_sum", the paper's equation 4) or the mean of ``||D||_F``
        ("mean_norm", the paper's code and PEFT).

        Returns:
            A 0-d tensor, one autograd node over all factors.
        """
        if form not in PENALTY_FORMS:
            raise ValueError(
                f"orthogonality_penalty: form must be in {PENALTY_FORMS}, got {form!r}"
            )
        self._check_unsharded()
        return self._core.orthogonality_penalty(squared=form == "squared_sum")

    def _check_unsharded(self) -> None:
        """Also for layers that were sharded after the allocator was made over their factors."""
        for name, layer in self._layers.items():
            factors = {f"{name}.{f}": getattr(layer, f) for f in ("lora_A", "lora_B", "lora_E")}
            check_unsharded("RankAllocator", factors, _UNSHARDED)

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
        """Takes a state_dict() back, and with it the layers' ranks.

        Raises:
            ValueError: listing what differs; nothing is changed.
        """
        ranks = self.ranks

        def plain(name: str) -> str:  # a state saved under wrappers may have their parts in names
            return name if enclosing(name, ranks) is not None else without_wrappers(name)

        self._core.load_state({plain(name): tensor for name, tensor in state.items()})

    def __repr__(self) -> str:
        budget = self.schedule.budget(self.steps)
        phase = "frozen" if self.frozen else f"budget {budget} of {self.schedule.initial_budget}"
        return f"RankAllocator({len(self.ranks)} adapters, step {self.steps}, {phase})"


def _adapter(name: str, layer: Adapted):
    factor = layer.lora_E

    def set_rank(rank: int) -> None:  # also when another adapter is active by then, or none
        for holder in (layer, *layer.adapters.values()):
            if holder.lora_E is factor:
                holder.rank = rank

    return library.Adapter(name, layer.lora_A, layer.lora_B, layer.lora_E, layer.rank, set_rank)


def _view(optimizer: Optimizer | None):
    """What the C++ side asks of an optimizer: its state by parameter, and found_inf."""
    if optimizer is None:
        return None, None

    @cache
    def parameters() -> set[int]:
        return {id(p) for group in optimizer.param_groups for p in group["params"]}

    def state_of(parameter: Tensor) -> list[Tensor] | None:
        """The state along a parameter's elements; None where some might be elsewhere."""
        mine = id(parameter) in parameters()
        state = optimizer.state.get(parameter, {})
        stepped = parameter.grad is not None and any(optimizer.state.values())
        if parameter.requires_grad and (not mine or (stepped and not state)):
            return None  # in another optimizer, or under another parameter (LBFGS)
        if not all(x is None or isinstance(x, (Tensor, int, float)) for x in state.values()):
            return None
        along = [x for x in state.values() if torch.is_tensor(x) and x.dim() > 0]
        return along if all(x.shape == parameter.shape for x in along) else None

    return state_of, getattr(optimizer, "found_inf", None)
