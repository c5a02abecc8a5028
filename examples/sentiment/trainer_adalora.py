"""PEFT's AdaLoRA in transformers' Trainer on film reviews; two lines put it on rankwise.

`python examples/sentiment/trainer_adalora.py --help`, in the environment of requirements.txt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import peft
import typer
from classifier import load_tokenizer, weights_folder
from rich import print
from snippets import Snippet, load_snippets, split
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from rankwise.integrations.peft import accelerate
from rankwise.integrations.transformers import AdaLoRACallback

BATCH = 32
OUTPUT = Path(__file__).resolve().parents[2] / "build" / "trainer"


def main(
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the snippets.")] = 2,
    snippets: Annotated[int, typer.Option(min=64, help="Of the 10,605, how many.")] = 10_605,
    seed: Annotated[int, typer.Option(help="Of the head, the adapter and the batches.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for checkpoints and the adapter.")] = OUTPUT,
) -> float:
    """Fine-tunes all-MiniLM-L6-v2 for the sentiment of film reviews; the accuracy at the end."""
    set_seed(seed)
    train, test = split(load_snippets())
    train, test = train[: snippets * 4 // 5], test[: snippets // 5]
    tokenizer = load_tokenizer()
    steps = -(-len(train) // BATCH) * epochs

    model = AutoModelForSequenceClassification.from_pretrained(weights_folder(), num_labels=2)
    config = peft.AdaLoraConfig(
        task_type="SEQ_CLS",
        target_modules=["query", "key", "value"],
        init_r=12,
        target_r=4,
        lora_alpha=32,
        tinit=steps // 10,
        tfinal=steps // 3,
        deltaT=10,
        total_step=steps,
    )
    model = peft.get_peft_model(model, config)
    print(accelerate(model))  # the first line: PEFT's layers run on rankwise's operators

    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(output),
            num_train_epochs=epochs,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=4 * BATCH,
            learning_rate=1e-3,
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="accuracy",
            disable_tqdm=not sys.stderr.isatty(),
            report_to=[],
            use_cpu=True,
        ),
        train_dataset=tokens(train, tokenizer),
        eval_dataset=tokens(test, tokenizer),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
        callbacks=[AdaLoRACallback()],  # the second: the allocator runs, and is in checkpoints
    )
    trainer.train()
    found = trainer.evaluate()["eval_accuracy"]
    model.save_pretrained(output / "adapter")  # a folder of PEFT's, with the ranks that were kept
    print(f"accuracy {found:.4f}; ranks {model.base_model.rankallocator.ranks}")
    print(f"adapter: {output / 'adapter'}")
    return found


def tokens(snippets: list[Snippet], tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    """Unpadded token ids with their labels."""
    ids = tokenizer([snippet.text for snippet in snippets])["input_ids"]
    pairs = zip(ids, snippets, strict=True)
    return [{"input_ids": text, "labels": snippet.label} for text, snippet in pairs]


def accuracy(predicted: EvalPrediction) -> dict[str, float]:
    """The share of snippets whose larger logit is the right one."""
    right = predicted.predictions.argmax(-1) == predicted.label_ids
    return {"accuracy": float(np.mean(right))}


if __name__ == "__main__":
    typer.run(main)
