"""AdaLoRACallback: AdaLoRA's allocator in transformers' Trainer, from first step to last."""

from __future__ import annotations

import gc

from torch import nn
from transformers.trainer_callback import CallbackHandler

from ...allocation import RankAllocator
from ...attachment import unwrapped
from ...file_config import adalora_config
from ...measures import measures
from ...rank_history import FILE as HISTORY
from ...rank_history import RankHistory
from ...warned import warn
from .allocator_state import carry, read, take, write
from .checkpoints import AdapterCallback, check_whole_parameters, checkpoint_folder


class AdaLoRACallback(AdapterCallback):
    """Runs AdaLoRA in a Trainer: ``Trainer(model, args, ..., callbacks=[AdaLoRACallback()])``.

    The allocator is attached when training begins and detached when it ends. Its state is in the
    checkpoints twice: in the optimizer's state, from which it is restored, and as
    ``rank_allocator.safetensors``. So resume_from_checkpoint goes on bit for bit, and
    load_best_model_at_end brings back what was evaluated. Checkpoints hold the adapter alone, see
    AdapterCallback, and ``rank_history.json`` for reports. Logs ``adalora/budget``,
    ``adalora/rank_mean`` and ``adalora/penalty``.

    Args:
        allocator: over the model's adapters; None to make it with adalora_config(model), or, of a
            PEFT model under rankwise.integrations.peft.accelerate(), for the model's own.
        orthogonality: weight of the penalty, whose gradients are added before each optimizer step,
            past the clipping; losses are without it. PEFT's models add their own to the loss.
        form: of the penalty, see RankAllocator.orthogonality_penalty.

    Raises:
        TypeError: another allocator.
        ValueError: when training begins: the schedule is longer than the training, the model has no
            AdaLoRA adapters, or DeepSpeed or FSDP would step.
        RuntimeError: then, when the allocator's steps are not the Trainer's: the checkpoint has no
            state of it, or it has made steps in another training.
    """

    def __init__(
        self,
        allocator: RankAllocator | None = None,
        orthogonality: float = 0.0,
        form: str = "squared_sum",
    ) -> None:
        if not isinstance(allocator, (RankAllocator, type(None))):
            raise TypeError(
                "AdaLoRACallback: allocator must be a RankAllocator or None, got "
                f"{type(allocator).__name__}; attach another to trainer.create_optimizer()"
            )
        self.allocator = allocator
        self.orthogonality = orthogonality
        self.form = form
        self._made_for: nn.Module | None = None
        self._handles: list = []

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **_) -> None:
        check_whole_parameters("AdaLoRACallback", args)
        _put_before_loggers(self)
        self._end()
        own = _own_allocator(model)
        if own is None:
            super().on_train_begin(args, state, control, model=model)
            self._make_for(model)
        else:
            self._take_over(own)
        if self.orthogonality and getattr(optimizer, "scaler", None) and not args.max_grad_norm:
            raise ValueError(
                "AdaLoRACallback: with fp16 and orthogonality args.max_grad_norm must be positive: "
                "without clipping gradients are scaled still when the penalty's are added"
            )
        self._check_length(state.max_steps)
        inner = unwrapped(optimizer)
        self._restore(args, state, take(inner))
        self._handles = [self.allocator.attach(inner), carry(self.allocator, inner)]

    def on_pre_optimizer_step(self, args, state, control, model=None, **_) -> None:
        super().on_pre_optimizer_step(args, state, control, model=model)
        if self.orthogonality:
            penalty = self.allocator.orthogonality_penalty(self.form)
            (self.orthogonality * penalty).backward()

    def on_log(self, args, state, control, logs=None, **_) -> None:
        if not self._handles or "loss" not in (logs or {}):
            return
        found = measures(self.allocator, self.form)
        logs.update(found)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(found)

    def on_save(self, args, state, control, model=None, **_) -> None:
        super().on_save(args, state, control, model=model)
        folder = checkpoint_folder(args, state)
        if folder is not None and self._handles:
            write(self.allocator, folder)
            RankHistory.of(self.allocator).save(folder / HISTORY)

    def on_train_end(self, args, state, control, **_) -> None:
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        stored = read(best) if best else None
        if stored is not None:  # of the model that was loaded before this event
            self.allocator.load_state_dict(stored)
        elif not self.allocator.frozen:
            warn(
                f"AdaLoRACallback: training ended at step {self.allocator.steps}, before the "
                "schedule chose the final directions; allocator.freeze(None) does"
            )
        if hasattr(self.allocator, "finish"):  # of a PEFT model
            self.allocator.finish()
        self._end()

    def _end(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _make_for(self, model: nn.Module) -> None:
        """An allocator where none was given; anew for another model, as of model_init."""
        if self.allocator is None or self._made_for not in (None, model):
            self.allocator, self._made_for = RankAllocator(model, adalora_config(model)), model

    def _take_over(self, own) -> None:
        if self.orthogonality:
            raise ValueError(
                "AdaLoRACallback: orthogonality must be 0 for PEFT's models, which add the penalty "
                f"to their loss by their config's orth_reg_weight, got {self.orthogonality}"
            )
        if not hasattr(own, "attach"):
            raise ValueError(
                "AdaLoRACallback: the model has PEFT's own allocator; call "
                "rankwise.integrations.peft.accelerate(model) first"
            )
        self.allocator, self.form = own, "mean_norm"

    def _check_length(self, max_steps: int) -> None:
        total = self.allocator.config.total_steps
        if total > max_steps:
            raise ValueError(
                f"AdaLoRACallback: the schedule has total_steps {total}, but the Trainer makes "
                f"{max_steps} (args.max_steps, or epochs), so the ranks would never be final; give "
                f"the AdaLoRAConfig total_steps={max_steps}"
            )
        if total < max_steps:
            warn(
                f"AdaLoRACallback: the schedule ends at total_steps {total}; the Trainer's steps "
                f"up to {max_steps} train with the final ranks"
            )

    def _restore(self, args, state, carried: dict | None) -> None:
        step, allocator = state.global_step, self.allocator
        if step > 0:
            stored = carried or read(f"{args.output_dir}/checkpoint-{step}")
            if stored is not None:
                allocator.load_state_dict(stored)
        made = allocator.steps + allocator.skipped_steps
        scaled = args.fp16 and 0 < made <= step  # a scaler leaves out steps
        over = step == 0 and made >= allocator.config.total_steps
        if made != step and not scaled and not over:
            raise RuntimeError(
                f"AdaLoRACallback: the allocator has made {made} steps, the Trainer {step}. To go "
                "on from a checkpoint it must have the optimizer's state or "
                "rank_allocator.safetensors, both written under this callback; to begin anew "
                "detach() the allocator and make a new one"
            )


def _own_allocator(model: nn.Module):
    """A PEFT model's; None for others."""
    return getattr(getattr(model, "base_model", None), "rankallocator", None)


def _put_before_loggers(callback: AdaLoRACallback) -> None:
    """Callbacks see logs as those before them left them, and a Trainer puts its loggers first.

    Nothing gives a callback the handler that holds it, so it is looked for.
    """
    handlers = [x for x in gc.get_objects() if issubclass(type(x), CallbackHandler)]
    for handler in handlers:
        if callback in handler.callbacks:
            if sum(isinstance(other, AdaLoRACallback) for other in handler.callbacks) > 1:
                raise ValueError("AdaLoRACallback: the Trainer has more than one of them")
            handler.callbacks.remove(callback)
            handler.callbacks.insert(0, callback)
