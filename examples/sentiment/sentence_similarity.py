"""sentence-transformers moves reviews of one opinion together; one line puts PEFT on rankwise.

`python examples/sentiment/sentence_similarity.py --help`, in the environment of requirements.txt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import datasets
import peft
import torch
import typer
from classifier import weights_folder
from rich.console import Console
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import BatchHardSoftMarginTripletLoss
from snippets import Snippet, load_snippets, split
from transformers import set_seed

from rankwise.integrations.peft import accelerate

BATCH = 64
OUTPUT = Path(__file__).resolve().parents[2] / "build" / "sentence_similarity"
console = Console(highlight=False, soft_wrap=True)


def main(
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the snippets.")] = 1,
    snippets: Annotated[int, typer.Option(min=64, help="Of the 10,605, how many.")] = 10_605,
    seed: Annotated[int, typer.Option(help="Of the adapter and the batches.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for the adapter.")] = OUTPUT,
) -> tuple[float, float]:
    """Trains LoRA by a triplet loss; the accuracies of the nearest review before and after."""
    set_seed(seed)
    train, test = split(load_snippets())
    train, test = train[: snippets * 4 // 5], test[: snippets // 5]
    model = SentenceTransformer(str(weights_folder()), device="cpu")
    before = nearest_accuracy(model, train, test)

    config = peft.LoraConfig(
        task_type="FEATURE_EXTRACTION", r=8, lora_alpha=16, target_modules="all-linear"
    )
    model.add_adapter(config)
    console.print(accelerate(model))  # the line: PEFT's layers run on rankwise's operators
    trainer = SentenceTransformerTrainer(
        model,
        SentenceTransformerTrainingArguments(
            output_dir=str(output),
            num_train_epochs=epochs,
            per_device_train_batch_size=BATCH,
            learning_rate=5e-4,
            warmup_steps=10,
            save_strategy="no",
            logging_steps=50,
            disable_tqdm=not sys.stderr.isatty(),
            report_to=[],
            use_cpu=True,
            seed=seed,
        ),
        train_dataset=datasets.Dataset.from_dict(
            {"text": [s.text for s in train], "label": [s.label for s in train]}
        ),
        loss=BatchHardSoftMarginTripletLoss(model),
    )
    trainer.train()
    after = nearest_accuracy(model, train, test)
    model.save_pretrained(str(output / "adapter"))
    console.print(
        f"the nearest of {len(train)} reviews has the opinion of a held-out one: "
        f"{before:.4f} before, {after:.4f} after"
    )
    console.print(f"adapter: {output / 'adapter'}")
    return before, after


def nearest_accuracy(
    model: SentenceTransformer, known: list[Snippet], asked: list[Snippet]
) -> float:
    """How often the snippet of the largest cosine similarity has the same label."""

    def embedded(snippets: list[Snippet]) -> torch.Tensor:
        return model.encode(
            [snippet.text for snippet in snippets],
            batch_size=4 * BATCH,
            convert_to_tensor=True,
            normalize_embeddings=True,
            show_progress_bar=sys.stderr.isatty(),
        )

    nearest = (embedded(asked) @ embedded(known).T).argmax(1).tolist()
    right = [known[i].label == snippet.label for i, snippet in zip(nearest, asked, strict=True)]
    return sum(right) / len(right)


if __name__ == "__main__":
    typer.run(main)
