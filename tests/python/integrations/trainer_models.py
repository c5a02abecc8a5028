# A small BERT classifier with random weights, saved as a local base, and Trainers over it.
from __future__ import annotations

from pathlib import Path

import torch
import transformers

import rankwise as rw

TARGETS = ["query", "value"]
STEPS = 12


def save_base(folder: Path) -> None:
    torch.manual_seed(5)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16, hidden_dropout_prob=0.1,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(folder)


def base(folder: Path) -> transformers.PreTrainedModel:
    return transformers.BertForSequenceClassification.from_pretrained(folder)


def lora_config(**options) -> rw.LoRAConfig:
    return rw.LoRAConfig(**dict(rank=4, target_modules=TARGETS, dropout=0.1) | options)


def adalora_config(**options) -> rw.AdaLoRAConfig:
    defaults = dict(
        initial_rank=6, target_rank=2, total_steps=STEPS, warmup_steps=2, final_steps=4,
        alpha=12.0, target_modules=TARGETS, dropout=0.1,
    )  # fmt: skip
    return rw.AdaLoRAConfig(**defaults | options)


def rows(count: int, seed: int = 0) -> list[dict]:
    """Token sequences whose label says whether their first token is large."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, 40, (count, 7), generator=generator)
    return [{"input_ids": row, "labels": int(row[0] > 20)} for row in tokens]


def arguments(folder: Path, **options) -> transformers.TrainingArguments:
    defaults = dict(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=4, report_to=[],
        use_cpu=True, disable_tqdm=True, logging_steps=1, learning_rate=0.02, save_steps=2,
        save_strategy="steps", seed=3,
    )  # fmt: skip
    return transformers.TrainingArguments(**defaults | options)


def trainer(model, folder: Path, callbacks: list, cls=transformers.Trainer, **options):
    return cls(
        model=model, args=arguments(folder, **options), train_dataset=rows(64),
        eval_dataset=rows(8, seed=1), callbacks=callbacks,
    )  # fmt: skip


def logits(model) -> torch.Tensor:
    tokens = torch.stack([row["input_ids"] for row in rows(8, seed=2)])
    was = model.training
    with torch.no_grad():
        found = model.eval()(input_ids=tokens).logits
    model.train(was)
    return found


def trained(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def same_bits(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


class Preferring(transformers.Trainer):
    """Evaluation prefers the checkpoint of the step `best`, and notes what each one computes."""

    best = 4

    def evaluate(self, *args, **options):
        metrics = super().evaluate(*args, **options)
        metrics["eval_score"] = float(self.state.global_step == self.best)
        self.outputs = getattr(self, "outputs", {})
        self.outputs[self.state.global_step] = logits(self.model)
        return metrics


def preferring(best: int) -> type[Preferring]:
    return type("PreferringStep", (Preferring,), {"best": best})


BEST = dict(
    eval_steps=2, eval_strategy="steps", load_best_model_at_end=True,
    metric_for_best_model="score", greater_is_better=True,
)  # fmt: skip
