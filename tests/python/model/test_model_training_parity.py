# Twenty AdamW steps beside stock PEFT from the same factors, float64: the same losses.
import copy

import peft
import pytest
import torch
import transformers
from small_models import adapted, bert_classifier
from torch import nn

import rankwise as rw
from rankwise.config import LoRAConfig

STEPS = 20
OPTIONS = {
    "plain": (dict(rank=4, alpha=8.0), dict(r=4, lora_alpha=8)),
    "rslora": (dict(rank=4, alpha=8.0, rslora=True), dict(r=4, lora_alpha=8, use_rslora=True)),
    "patterns": (
        dict(rank=4, alpha=8.0, rank_pattern={"value": 2}, alpha_pattern={"dense": 3.0}),
        dict(r=4, lora_alpha=8, rank_pattern={"value": 2}, alpha_pattern={"dense": 3.0}),
    ),
}
TARGETS = ["query", "value", "dense", "word_embeddings"]


def batches() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(tokens [4, 9], attention mask, labels [4]) for each step."""
    generator = torch.Generator().manual_seed(8)
    made = []
    for _ in range(STEPS):
        tokens = torch.randint(2, 40, (4, 9), generator=generator)
        lengths = torch.randint(3, 10, (4, 1), generator=generator)
        labels = torch.randint(0, 2, (4,), generator=generator)
        made.append((tokens, (torch.arange(9) < lengths).long(), labels))
    return made


def losses(model: nn.Module, data) -> list[float]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)
    found = []
    for tokens, mask, labels in data:
        optimizer.zero_grad()
        loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.filterwarnings("ignore")
def test_the_same_losses_as_peft(option):
    ours, theirs = OPTIONS[option]
    plain = bert_classifier().double()
    head = ["classifier"]
    model = rw.apply_lora(
        copy.deepcopy(plain), LoRAConfig(target_modules=TARGETS, modules_to_save=head, **ours)
    )
    stock = peft.get_peft_model(
        copy.deepcopy(plain),
        peft.LoraConfig(target_modules=TARGETS, modules_to_save=head, **theirs),
    )
    with torch.no_grad():
        for name, layer in adapted(model).items():
            other = stock.get_submodule(f"base_model.model.{name}")
            assert other.scaling["default"] == pytest.approx(layer.scaling, abs=0)
            if isinstance(layer, nn.Embedding):
                other.lora_embedding_A["default"].data = layer.lora_A.detach().clone()
                other.lora_embedding_B["default"].data = layer.lora_B.detach().clone()
            else:
                other.lora_A["default"].weight.data = layer.lora_A.detach().clone()
                other.lora_B["default"].weight.data = layer.lora_B.detach().clone()
    data = batches()
    mine, reference = losses(model.train(), data), losses(stock.train(), data)
    assert max(abs(a - b) for a, b in zip(mine, reference, strict=True)) <= 1e-9
    assert min(reference[10:]) < reference[0] - 0.01  # it did learn


def test_overfitting_one_batch_with_the_base_untouched():
    plain = bert_classifier()
    base = {name: value.clone() for name, value in plain.state_dict().items()}
    config = LoRAConfig(rank=4, target_modules="all-linear", modules_to_save=["classifier"])
    model = rw.apply_lora(plain, config)
    found = losses(model.train(), batches()[:1] * 60)
    assert found[-1] < 0.05 < found[0]
    rw.activate_adapter(model, None)
    for name, value in base.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_the_trainer_of_transformers_trains_it(tmp_path):
    model = rw.apply_lora(
        bert_classifier(),
        LoRAConfig(rank=2, target_modules=["query", "value"], modules_to_save=["classifier"]),
    )
    data = [
        {"input_ids": t[0], "attention_mask": m[0], "labels": y[0]} for t, m, y in batches()[:4]
    ]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[],
        use_cpu=True, save_steps=2, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    transformers.Trainer(model=model, args=arguments, train_dataset=data).train()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and changed <= {n for n, p in model.named_parameters() if p.requires_grad}
    assert (tmp_path / "checkpoint-2").is_dir()
