"""Trainings of rankwise's AdaLoRA models in the Trainer."""

import torch
from trainer_models import STEPS, adalora_config, base, trainer

import rankwise as rw
from rankwise.integrations.transformers import AdaLoRACallback

FREEZE = STEPS - 4


def adapted(folder, **options):
    torch.manual_seed(1)
    return rw.apply_lora(base(folder / "base"), adalora_config(**options))


def ranks(model) -> list[int]:
    return [x.rank for x in model.modules() if isinstance(x, rw.nn.AdaLoRALinear)]


def run(model, folder, callback=None, **options):
    """(the callback, the Trainer) after training."""
    callback = callback or AdaLoRACallback()
    made = trainer(model, folder, [callback], **options)
    made.train()
    return callback, made
