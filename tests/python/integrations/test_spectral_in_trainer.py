# A SpectralAllocator in transformers' Trainer: attached to its optimizer.
import warnings

import peft
import pytest
import torch
from trainer_models import STEPS, TARGETS, base, logits, trainer

import rankwise as rw
from rankwise.integrations.transformers import AdaLoRACallback, AdapterCallback

CONFIG = rw.SpectralConfig(
    initial_rank=3, alpha=6.0, total_steps=STEPS, warmup_steps=2, final_steps=4,
    allocation_interval=2, target_modules=TARGETS,
)  # fmt: skip


def test_it_is_attached_to_the_trainers_optimizer(folder):
    model = rw.apply_lora(base(folder / "base"), CONFIG)
    allocator = rw.SpectralAllocator(model, CONFIG)
    its = trainer(model, folder / "run", [AdapterCallback()])
    allocator.attach(its.create_optimizer())
    its.train()
    assert allocator.steps == STEPS and allocator.frozen and len(allocator.history) == 3
    its.save_model(folder / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = peft.PeftModel.from_pretrained(base(folder / "base"), folder / "saved")
    torch.testing.assert_close(logits(stock), logits(model), rtol=0, atol=1e-5)


def test_the_callback_of_adalora_refuses_it(folder):
    model = rw.apply_lora(base(folder / "base"), CONFIG)
    with pytest.raises(TypeError, match="must be a RankAllocator or None, got SpectralAllocator"):
        AdaLoRACallback(rw.SpectralAllocator(model, CONFIG))
