"""The task in PEFT's folders, or the base model's class, by which others make the base model."""

from __future__ import annotations

from torch import nn

from .sharding import plain_class
from .wrappers import unwrapped

TASKS = (
    "SEQ_CLS",
    "SEQ_2_SEQ_LM",
    "CAUSAL_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)


def check_task(owner: str, task_type: str | None) -> None:
    """PEFT refuses a whole folder for another."""
    if task_type not in (None, *TASKS):
        raise ValueError(f"{owner}: task_type must be None or one of {TASKS}, got {task_type!r}")


def name_task(config, model: nn.Module, task_type: str | None) -> None:
    """Notes the task, where one is given or known, else, as PEFT does, the model's class.

    Of a model without a name nobody could make the base, so that its class says nothing.
    """
    config.task_type = task_type or config.task_type
    if config.base_model_name_or_path and not config.task_type:
        kind = plain_class(unwrapped(model))
        config.base_model_class, config.parent_library = kind.__name__, kind.__module__
