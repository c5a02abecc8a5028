"""TRL's SFTTrainer teaches SmolLM2-135M to answer as a robot would; one line puts it on rankwise.

`python examples/smollm2/sft.py --help`, in the environment of requirements.txt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import datasets
import peft
import torch
import typer
from dialogues import Dialogue, load_dialogues, split
from rich.console import Console
from smollm2 import load_model, load_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, SFTTrainer

from rankwise.integrations.peft import accelerate

BATCH = 8
OUTPUT = Path(__file__).resolve().parents[2] / "build" / "sft"
QUESTIONS = ("Do you like to eat?", "Are you a robot?", "Tell me a joke.")
console = Console(highlight=False, soft_wrap=True)


def main(
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the dialogues.")] = 1,
    dialogues: Annotated[int, typer.Option(min=20, help="Of the 899, how many.")] = 899,
    seed: Annotated[int, typer.Option(help="Of the adapter and the batches.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for the adapter.")] = OUTPUT,
) -> tuple[float, float]:
    """Trains LoRA on dialogues; the mean loss of held-out answers before and after."""
    set_seed(seed)
    train, test = split(load_dialogues()[:dialogues])
    tokenizer = load_tokenizer()
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    trainer = SFTTrainer(
        load_model(),
        SFTConfig(
            output_dir=str(output),
            num_train_epochs=epochs,
            per_device_train_batch_size=BATCH,
            learning_rate=5e-4,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            max_length=96,
            logging_steps=10,
            save_strategy="no",
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=not sys.stderr.isatty(),
            report_to=[],
            use_cpu=True,
            seed=seed,
        ),
        train_dataset=answers(train),
        eval_dataset=answers(test),
        processing_class=tokenizer,
        peft_config=config,
    )
    console.print(accelerate(trainer.model))  # the line: PEFT's layers run on rankwise's operators

    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model(output / "adapter")  # a folder of PEFT's
    console.print(f"loss of {len(test)} held-out answers: {before:.3f} before, {after:.3f} after")
    for question in QUESTIONS:
        with trainer.model.disable_adapter():
            was = reply(trainer.model, tokenizer, question)
        console.print(f"{question}\n  before: {was}")
        console.print(f"  after:  {reply(trainer.model, tokenizer, question)}")
    console.print(f"adapter: {output / 'adapter'}")
    return before, after


def answers(dialogues: list[Dialogue]) -> datasets.Dataset:
    """What is learnt is the last turn of each dialogue."""
    return datasets.Dataset.from_list(
        [{"prompt": turns[:-1], "completion": turns[-1:]} for turns in dialogues]
    )


@torch.no_grad()
def reply(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """The likeliest answer, at most 32 tokens of it."""
    model.eval()
    tokens = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    made = model.generate(**tokens, max_new_tokens=32, do_sample=False)
    text = tokenizer.decode(made[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(text.split())


if __name__ == "__main__":
    typer.run(main)
