# transformers' Trainer: the best checkpoint, from before the freeze, is loaded at the end.
import pytest
import safetensors.torch
import torch
import transformers
from allocation_models import Network
from torch import Tensor, nn

import rankwise as rw

STEPS, BEST = 12, 4


class Plain(nn.Module):
    """Not a PreTrainedModel, whose checkpoints the Trainer writes by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Network(torch.float32)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        y = self.net(x)
        return {"loss": (y - labels).square().mean(), "logits": y}


class Config(transformers.PretrainedConfig):
    model_type = "allocated"


class Pretrained(transformers.PreTrainedModel):
    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.net = Network(torch.float32)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return Plain.forward(self, x, labels)


class Allocate(transformers.TrainerCallback):
    """Attaches the allocator, notes what each checkpoint computes, and prefers the fourth."""

    def __init__(self, allocator: rw.RankAllocator, x: Tensor) -> None:
        self.allocator, self.x, self.outputs = allocator, x, {}

    def on_train_begin(self, args, state, control, optimizer=None, **_):
        self.allocator.attach(optimizer)

    def on_save(self, args, state, control, model=None, **_):
        with torch.no_grad():
            self.outputs[state.global_step] = model(self.x, self.x[:, :3])["logits"]


class Preferring(transformers.Trainer):
    def evaluate(self, *args, **options):
        metrics = super().evaluate(*args, **options)
        metrics["eval_score"] = float(self.state.global_step == BEST)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


@pytest.mark.parametrize("make", [Plain, lambda: Pretrained(Config())], ids=["plain", "pretrained"])
def test_the_best_model_at_the_end_is_what_it_was(tmp_path, make):
    torch.manual_seed(0)
    config = rw.AdaLoRAConfig(
        initial_rank=6, target_rank=2, alpha=12.0, total_steps=STEPS, final_steps=4,
        target_modules=["first", "second", "third"],
    )  # fmt: skip
    model = rw.apply_lora(make(), config)
    allocator = rw.RankAllocator(model, config)
    x = torch.randn(8, 6)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=STEPS, per_device_train_batch_size=4, report_to=[],
        use_cpu=True, disable_tqdm=True, logging_strategy="no", learning_rate=0.05,
        save_steps=2, eval_steps=2, save_strategy="steps", eval_strategy="steps",
        load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True,
    )  # fmt: skip
    data = [{"x": row, "labels": torch.sin(3 * row[:3])} for row in torch.randn(64, 6)]
    allocate = Allocate(allocator, x)
    trainer = Preferring(
        model=model, args=arguments, train_dataset=data, eval_dataset=data[:8], callbacks=[allocate]
    )
    trainer.train()
    assert allocator.frozen and sum(allocator.ranks.values()) == 6
    assert trainer.state.best_model_checkpoint.endswith(f"-{BEST}")
    with torch.no_grad():
        assert torch.equal(model(x, x[:, :3])["logits"], allocate.outputs[BEST])
    assert not torch.allclose(allocate.outputs[BEST], allocate.outputs[STEPS])

    stored = safetensors.torch.load_file(tmp_path / f"checkpoint-{STEPS}" / "model.safetensors")
    fresh = rw.apply_lora(make(), config)
    assert fresh.load_state_dict(stored) == ([], [])
    with torch.no_grad():
        assert torch.equal(fresh(x, x[:, :3])["logits"], allocate.outputs[STEPS])
