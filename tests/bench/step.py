# Whole training steps of pretrained models: LoRA and AdaLoRA by rankwise, by PEFT on rankwise's
# operators and by stock PEFT.
"""Times steps of MiniLM and of SmolLM2-135M, every linear layer adapted; writes tables and JSON.

A step is forward, backward, AdamW, and for AdaLoRA
also the orthogonality penalty and the allocator, each phase by itself (adalora_phases.py). Steps
are timed only after loss and gradients were found to be PEFT's (step_contenders.check_same).
Contenders share the base's parameters, because where they lie in memory is worth a percent, and
take turns in random order in one process; "twice" is the noise of the method.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

from rich.table import Table

from .adalora_phases import PHASES
from .adalora_phases import RANK as ADALORA_RANK
from .measurement import Measurement, names
from .step_contenders import RANK, adalora_steps, frozen, lora_steps, our_lora, peft_lora
from .step_tasks import TASKS, Task
from .timing import Samples, as_json, console, sampled, table, timings
from .training_step import Step

DROPOUT = 0.1
WITH_DROPOUT = f"LoRA, dropout {DROPOUT}"
# model -> [(contender, reference, the speed-up that is wanted; 0.98 is 2 % slower)]
GOALS = {
    "minilm": [
        ("LoRA", "PEFT LoRA", 1.25),
        *((f"AdaLoRA, {phase}", f"PEFT AdaLoRA, {phase}", 1.35) for phase in PHASES),
        ("AdaLoRA, warm-up", f"LoRA of rank {ADALORA_RANK}", 0.98),
        ("AdaLoRA, budgeting", f"LoRA of rank {ADALORA_RANK}", 0.98),
        ("AdaLoRA, final", "LoRA of the kept ranks", 0.98),
        ("accelerated PEFT LoRA", "PEFT LoRA", 1 / 0.82),
        (f"accelerated PEFT {WITH_DROPOUT}", f"PEFT {WITH_DROPOUT}", 1 / 0.74),
        *(
            (f"accelerated PEFT AdaLoRA, {phase}", f"PEFT AdaLoRA, {phase}", 1 / 0.80)
            for phase in PHASES
        ),
    ],
    "smollm2": [
        ("LoRA", "PEFT LoRA", 1.2),
        (WITH_DROPOUT, f"PEFT {WITH_DROPOUT}", 1.2),
        ("accelerated PEFT LoRA", "PEFT LoRA", 1 / 0.90),
        (f"accelerated PEFT {WITH_DROPOUT}", f"PEFT {WITH_DROPOUT}", 1 / 0.76),
    ],
}

Steps = dict[str, Callable[[], object]]


def alike(name: str, steps: tuple[Step, Step, Step]) -> Steps:
    """The three by name."""
    return dict(zip((f"PEFT {name}", f"accelerated PEFT {name}", name), steps, strict=True))


def lora(task: Task) -> Steps:
    twice = {"PEFT LoRA, twice": peft_lora(task), "frozen": frozen(task)}
    without = alike("LoRA", lora_steps(task)) | twice
    return without | alike(WITH_DROPOUT, lora_steps(task, DROPOUT))


def adalora(task: Task) -> Steps:
    """All in each phase, and LoRA of the same ranks."""
    steps: dict[str, Step] = {f"LoRA of rank {ADALORA_RANK}": our_lora(task, rank=ADALORA_RANK)}
    for phase in PHASES:
        steps |= alike(f"AdaLoRA, {phase}", adalora_steps(task, phase))
    kept = steps["AdaLoRA, final"].allocator.ranks
    steps["LoRA of the kept ranks"] = our_lora(task, rank_pattern=kept)
    return steps


def contenders(model: str, task: Task) -> Steps:
    return lora(task) | (adalora(task) if model == "minilm" else {})


def goals(model: str, samples: Samples) -> list[dict]:
    """Speed-ups over PEFT: medians and quartiles of paired steps, and what was wanted."""
    found = []
    for name, reference, wanted in GOALS[model]:
        own = timings(samples, name, [reference])[reference]
        found.append(
            {"what": f"{name} over {reference}", "speed-up": own.ratio, "low": own.ratio_low}
            | {"high": own.ratio_high, "wanted": wanted}
        )
    return found


def goal_table(found: list[dict]) -> Table:
    result = Table(title="Speed-up, median of paired steps", title_justify="left")
    for column in ("what", "measured (quartiles)", "wanted", ""):
        result.add_column(column)
    for row in found:
        reached = "[green]reached[/green]" if row["speed-up"] >= row["wanted"] else "[red]no[/red]"
        measured = "{speed-up:.3f} ({low:.3f} .. {high:.3f})".format(**row)
        result.add_row(row["what"], measured, f"{row['wanted']:.3g}", reached)
    return result


def run(options: Namespace) -> dict[str, dict]:
    report = {}
    for name in options.models:
        task = TASKS[name]()
        samples = sampled(contenders(name, task), options.repeats)
        rows, found = timings(samples, "PEFT LoRA"), goals(name, samples)
        console.print(table(f"{task.name}, one training step, r {RANK}", rows, "PEFT LoRA"))
        console.print(goal_table(found))
        report[name] = {"steps": as_json(rows), "goals": found}
    return report


MEASUREMENT = Measurement(
    run,
    repeats=15,
    quick={"repeats": 3, "models": ["minilm"]},
    arguments={"--models": names(list(TASKS), list(TASKS), "what is trained")},
)
