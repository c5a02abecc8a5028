# AdaLoRA's schedule for a measurement of one phase by itself, for PEFT and for rankwise.
"""Nobody trains for STEPS: each phase is entered at once and lasts as long as is measured."""

from __future__ import annotations

from peft import AdaLoraConfig

import rankwise as rw

RANK, TARGET, STEPS = 12, 8, 10**6
FINAL = 10
PENALTY = 0.1  # weight of the orthogonality penalty in the loss, in the form of PEFT
# phase -> (PEFT's step that is timed, warm-up steps of PEFT, warm-up steps of rankwise)
PHASES = {
    "warm-up": (2, 10, STEPS - FINAL - 1),
    "budgeting": (STEPS // 2, 0, 0),
    "final": (STEPS - FINAL // 2, 0, 0),
}


def peft_config(phase: str, **options) -> AdaLoraConfig:
    _, warmup, _ = PHASES[phase]
    return AdaLoraConfig(
        init_r=RANK, target_r=TARGET, tinit=warmup, tfinal=FINAL, deltaT=1, total_step=STEPS,
        lora_alpha=2 * RANK, orth_reg_weight=PENALTY, **options,
    )  # fmt: skip


def our_config(phase: str, **options) -> rw.AdaLoRAConfig:
    _, _, warmup = PHASES[phase]
    return rw.AdaLoRAConfig(
        initial_rank=RANK, target_rank=TARGET, alpha=2 * RANK, total_steps=STEPS,
        warmup_steps=warmup, final_steps=FINAL, **options,
    )  # fmt: skip


def enter_final(peft_model) -> None:
    """PEFT's choice of the final directions, from the gradients that are there."""
    peft_model.base_model.update_and_allocate(1)
    peft_model.base_model.update_and_allocate(STEPS - FINAL)
