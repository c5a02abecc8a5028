# Whole training steps of MiniLM: AdaLoRA in each phase against plain LoRA of the same ranks.
"""Prints medians and quartiles of milliseconds, and the median of the ratios of paired steps.

    python tests/bench/adalora_step.py [--repeats 30] [--threads 2] [--batch 32] [--length 64]

A step is zero_grad, forward, backward and AdamW, and for AdaLoRA also the orthogonality penalty and
the allocator, which averages (warm-up) and chooses (budgeting) in every step. "kept ranks" is LoRA
with the rank that AdaLoRA left each matrix. Contenders share the base's parameters, because where
they lie in memory is worth a percent, and alternate in random order in one process; "twice" is the
noise of the method.
"""

from __future__ import annotations

import copy
import random
from typing import Annotated

import torch
import typer
from timing import console, paired, table
from transformers import BertConfig, BertModel

import rankwise as rw

RANK, TARGET, STEPS = 12, 4, 10**6
CONFIG = BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
WHERE = {"target_modules": "all-linear"}


torch.manual_seed(0)
BASE = BertModel(CONFIG, add_pooling_layer=False).train()


class Contender:
    """A model over the one base, with its optimizer; step() is one training step."""

    def __init__(self, config, ids: torch.Tensor) -> None:
        model = copy.deepcopy(BASE, {id(p): p for p in BASE.parameters()})
        self.model, self.ids = rw.apply_lora(model, config), ids
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
        self.allocator = None
        if isinstance(config, rw.AdaLoRAConfig):
            self.allocator = rw.RankAllocator(self.model, config)
            self.allocator.attach(self.optimizer)

    def step(self) -> None:
        self.optimizer.zero_grad()
        loss = self.model(self.ids).last_hidden_state.square().mean()
        if self.allocator is not None:
            loss = loss + 0.1 * self.allocator.orthogonality_penalty()
        loss.backward()
        self.optimizer.step()


def contenders(ids: torch.Tensor) -> dict[str, list[tuple[str, Contender]]]:
    """{comparison: [(name, contender)]}, the first the reference."""

    def adalora(**options) -> Contender:
        config = rw.AdaLoRAConfig(
            initial_rank=RANK, target_rank=TARGET, total_steps=STEPS, **options, **WHERE
        )
        return Contender(config, ids)

    def lora(rank: int = RANK, **options) -> Contender:
        return Contender(rw.LoRAConfig(rank=rank, **options, **WHERE), ids)

    frozen = adalora()
    for _ in range(3):
        frozen.step()
    frozen.allocator.freeze(frozen.optimizer)
    kept = frozen.allocator.ranks
    return {
        f"LoRA of rank {RANK}": [
            ("LoRA", lora()),
            ("LoRA, twice", lora()),
            ("AdaLoRA, warm-up", adalora(warmup_steps=STEPS - 2)),
            ("AdaLoRA, budgeting", adalora()),
        ],
        "LoRA of the kept ranks": [
            ("LoRA", lora(rank_pattern=kept)),
            ("LoRA, twice", lora(rank_pattern=kept)),
            ("AdaLoRA, final", frozen),
        ],
    }


def main(
    repeats: Annotated[int, typer.Option(help="Turns of each contender.")] = 30,
    threads: Annotated[int, typer.Option(help="Of PyTorch.")] = 2,
    batch: Annotated[int, typer.Option(help="Texts in a step.")] = 32,
    length: Annotated[int, typer.Option(help="Tokens of each text.")] = 64,
) -> None:
    """Times whole training steps with AdaLoRA against plain LoRA."""
    torch.set_num_threads(threads)
    random.seed(0)
    ids = torch.randint(0, CONFIG.vocab_size, (batch, length))
    for reference, rows in contenders(ids).items():
        timings = paired({name: own.step for name, own in rows}, repeats)
        console.print(table("MiniLM, one training step", timings, reference))


if __name__ == "__main__":
    typer.run(main)
