# Beside PEFT's own AdaLoRA allocator on the same weights and gradients: masks, pattern, schedule.
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from allocation_models import LAYERS, LETTERS, Network, normal
from peft.tuners.adalora.layer import RankAllocator as PeftAllocator

import rankwise as rw
from rankwise._library import library

RUNS = {
    "plain": dict(total_steps=30),
    "warmup and final": dict(total_steps=40, warmup_steps=8, final_steps=11),
    "interval divides": dict(total_steps=41, warmup_steps=4, final_steps=9, allocation_interval=4),
    "interval does not": dict(total_steps=43, warmup_steps=5, final_steps=6, allocation_interval=7),
    "interval too long": dict(
        total_steps=20, warmup_steps=3, final_steps=2, allocation_interval=50
    ),
    "one step": dict(total_steps=9, warmup_steps=3, final_steps=5),
    "target 0": dict(total_steps=25, final_steps=3, target_rank=0),
    "target close": dict(total_steps=25, final_steps=3, target_rank=5),
    "betas": dict(total_steps=25, beta1=0.5, beta2=0.99, allocation_interval=3),
}


def pair(**options):
    """(our model, our allocator, PEFT's model)."""
    options = dict(initial_rank=6, target_rank=2) | options
    config = rw.AdaLoRAConfig(target_modules=LAYERS, **options)
    ours = rw.apply_lora(Network(), config)
    theirs = peft.get_peft_model(
        Network(),
        peft.AdaLoraConfig(
            target_modules=list(LAYERS),
            init_r=config.initial_rank,
            target_r=config.target_rank,
            tinit=config.warmup_steps,
            tfinal=config.final_steps,
            deltaT=config.allocation_interval,
            beta1=config.beta1,
            beta2=config.beta2,
            total_step=config.total_steps,
        ),
    )
    return ours, rw.RankAllocator(ours, config), theirs


def factor_pairs(ours, theirs, letter: str):
    for name in LAYERS:
        other = getattr(theirs.get_submodule(f"base_model.model.{name}"), LETTERS[letter])
        yield getattr(ours.get_submodule(name), LETTERS[letter]), other["default"]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.filterwarnings("ignore")
def test_the_same_masks_and_pattern_as_peft(run, seed):
    options = RUNS[run] | dict(shrink=False)
    ours, allocator, theirs = pair(**options)
    config, random = allocator.config, normal(seed)
    masked = 0
    for step in range(1, config.total_steps + 1):
        for letter in LETTERS:
            for mine, other in factor_pairs(ours, theirs, letter):
                assert mine.shape == other.shape
                with torch.no_grad():
                    mine.add_(random(mine.shape))
                    other.copy_(mine)
                mine.grad = random(mine.shape)
                other.grad = mine.grad.clone()
        allocator.step(None)
        theirs.base_model.update_and_allocate(step)
        for mine, other in factor_pairs(ours, theirs, "E"):
            assert torch.equal(mine, other), f"step {step}"
            masked += int((mine == 0).sum())
        if allocator.scores is not None and step < config.total_steps - config.final_steps:
            tables = theirs.base_model.rankallocator
            wanted = [peft_scores(tables, name) for name in LAYERS]
            assert torch.allclose(allocator.scores, torch.cat(wanted), rtol=1e-12, atol=0)
        if (pattern := theirs.peft_config["default"].rank_pattern) is not None and pattern:
            got = [kept.tolist() for kept in allocator.pattern.values()]
            assert got == list(pattern.values()), f"step {step}"
    assert masked > 0 and sum(allocator.ranks.values()) == 3 * config.target_rank


def peft_scores(tables: PeftAllocator, name: str) -> torch.Tensor:
    def element(letter: str) -> torch.Tensor:
        wanted = f"{name}.{LETTERS[letter]}.default"
        (key,) = [key for key in tables.exp_avg_ipt if key.endswith(wanted)]
        return tables._element_score(key)

    return element("E").view(-1) + element("A").mean(dim=1) + element("B").mean(dim=0)


def test_the_same_schedule_as_peft():
    random = np.random.default_rng(7)
    for _ in range(400):
        total = int(random.integers(1, 400))
        warmup = int(random.integers(0, total))
        final = int(random.integers(0, total - warmup))
        interval = int(random.integers(1, 30))
        initial = int(random.choice((1, 2, 17, 300, 12 * 224, 10**9)))
        target = int(random.integers(0, initial + 1))
        options = rw.AdaLoRAConfig(
            target_modules=LAYERS, initial_rank=1, target_rank=1, total_steps=total,
            warmup_steps=warmup, final_steps=final, allocation_interval=interval,
        ).allocation_options()  # fmt: skip
        schedule = library.BudgetSchedule(initial, target, options)
        theirs = SimpleNamespace(init_bgt=initial, target_bgt=target)
        theirs.peft_config = SimpleNamespace(
            tinit=warmup, tfinal=final, total_step=total, deltaT=interval
        )
        for step in range(total + 3):
            budget, masks = PeftAllocator.budget_schedule(theirs, step)
            assert schedule.budget(step) == budget, (options, step)
            if step < total - final:
                assert schedule.allocates(step) == masks, (options, step)
            else:  # PEFT forces the choice at the freeze and repeats its pattern from there on
                assert schedule.allocates(step) == (step == total - final), (options, step)
