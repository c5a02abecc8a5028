# Training steps by PEFT, by PEFT on our operators and by rankwise over one base, checked to be one.
"""Each step is what a user writes: forward, backward, AdamW, and AdaLoRA's allocation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import rankwise as rw
from rankwise.integrations.peft import accelerate

from .adalora_phases import PENALTY, PHASES, enter_final, our_config, peft_config
from .step_tasks import Task
from .training_step import Step, optimizer_of, shared

RANK = 8
FACTORS = ("lora_A", "lora_B", "lora_E")
# Of a norm. Sums in another order alone move gradients of MiniLM by up to 4e-6 of theirs.
TOLERANCE = 2e-5


def frozen(task: Task) -> Callable[[], None]:
    """Forward, and backward to the embedded tokens: the cost of the base alone."""
    model = shared(task.model).requires_grad_(False)
    embedded = task.embedded.clone().requires_grad_()
    inputs = {k: v for k, v in task.inputs.items() if k != "input_ids"}
    inputs["inputs_embeds"] = embedded
    return lambda: torch.autograd.grad(model(**inputs).loss, embedded)


def _peft_step(task: Task, config: LoraConfig, after=lambda model: None) -> Step:
    model = get_peft_model(shared(task.model), config)
    forward = model.base_model  # as PEFT's classes of tasks do; PeftModel leaves the penalty out
    return Step(
        model, lambda: forward(**task.inputs).loss, optimizer_of(model), lambda: after(model)
    )


def peft_lora(task: Task, dropout: float = 0.0) -> Step:
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, lora_dropout=dropout, target_modules=task.targets,
        modules_to_save=task.whole,
    )  # fmt: skip
    return _peft_step(task, config)


def our_lora(task: Task, dropout: float = 0.0, rank: int = RANK, **options) -> Step:
    config = rw.LoRAConfig(
        rank=rank, alpha=2 * rank, dropout=dropout, target_modules=task.targets,
        modules_to_save=task.whole, **options,
    )  # fmt: skip
    model = rw.apply_lora(shared(task.model), config)
    return Step(model, lambda: model(**task.inputs).loss, optimizer_of(model))


def peft_adalora(task: Task, phase: str) -> Step:
    config = peft_config(phase, target_modules=task.targets, modules_to_save=task.whole)
    step, *_ = PHASES[phase]
    return _peft_step(task, config, lambda model: model.base_model.update_and_allocate(step))


def our_adalora(task: Task, phase: str) -> Step:
    config = our_config(phase, target_modules=task.targets, modules_to_save=task.whole)
    model = rw.apply_lora(shared(task.model), config)
    allocator, optimizer = rw.RankAllocator(model, config), optimizer_of(model)

    def loss() -> Tensor:
        return model(**task.inputs).loss + PENALTY * allocator.orthogonality_penalty("mean_norm")

    allocator.attach(optimizer)
    return Step(model, loss, optimizer, allocator=allocator)


def accelerated_adalora(task: Task, phase: str) -> Step:
    _, _, warmup = PHASES[phase]  # as ours, whose steps count from 1
    config = peft_config(phase, target_modules=task.targets, modules_to_save=task.whole)
    step = _peft_step(task, replace(config, tinit=warmup))
    accelerate(step.model)
    allocator = step.model.base_model.rankallocator
    allocator.attach(step.optimizer)
    return replace(step, allocator=allocator)


def adalora_steps(task: Task, phase: str) -> tuple[Step, Step, Step]:
    """(PEFT's, PEFT's on our operators, ours), checked, then brought into their phase."""
    theirs, ours = peft_adalora(task, phase), our_adalora(task, phase)
    accelerated = accelerated_adalora(task, phase)
    check_same(task, theirs, ours)
    check_same(task, theirs, accelerated)
    if phase == "final":
        theirs.loss().backward()
        enter_final(theirs.model)
        for step in (ours, accelerated):
            step()
            step.allocator.freeze(step.optimizer)
    return theirs, accelerated, ours


def lora_steps(task: Task, dropout: float = 0.0) -> tuple[Step, Step, Step]:
    """(PEFT's, PEFT's on our operators, ours), checked where no dropout parts them."""
    theirs, accelerated, ours = (
        peft_lora(task, dropout), peft_lora(task, dropout), our_lora(task, dropout)
    )  # fmt: skip
    accelerate(accelerated.model)
    if dropout == 0:
        check_same(task, theirs, ours)
        check_same(task, theirs, accelerated)
    return theirs, accelerated, ours


def check_same(task: Task, theirs: Step, ours: Step) -> None:
    """Gives PEFT our factors; raises unless loss and gradients are the same but for rounding.

    The adapter's dropout, whose masks differ, must be off.
    """
    own, others = _factors(task, ours.model), _factors(task, theirs.model)
    for parameter in own.values():
        nn.init.normal_(parameter, std=0.05)  # B or E begin at zero, which would hide gradients
    with torch.no_grad():
        for name, parameter in own.items():
            others[name].copy_(parameter)
    losses = []
    for step in (theirs, ours):
        torch.manual_seed(0)  # of the base's own dropout
        losses.append(step.loss())
        losses[-1].backward()
    _same(task, "the loss", losses[1].detach(), losses[0].detach())
    for name, parameter in own.items():
        _same(task, f"the gradient of {name}", parameter.grad, others[name].grad)
    for step in (theirs, ours):
        step.optimizer.zero_grad()


def _factors(task: Task, model: nn.Module) -> dict[str, nn.Parameter]:
    peft = isinstance(model, PeftModel)
    found = {}
    for name in task.targets:
        layer = (model.base_model.model if peft else model).get_submodule(name)
        for factor in FACTORS:
            held = getattr(layer, factor, None)
            held = held["default"] if peft and held is not None else held
            if held is not None:
                weight = held.weight if isinstance(held, nn.Linear) else held
                found[f"{name}.{factor}"] = weight
    return found


def _same(task: Task, what: str, got: Tensor, wanted: Tensor) -> None:
    error = ((got - wanted).norm() / wanted.norm()).item()
    if not error <= TOLERANCE:
        raise AssertionError(
            f"{task.name}: {what} must be PEFT's but for {TOLERANCE:g} of its norm, got {error:.2e}"
        )
