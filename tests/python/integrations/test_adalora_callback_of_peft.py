# AdaLoRACallback with PEFT's AdaLoRA, accelerated: resuming, the best model, finishing once.
import peft
import pytest
import torch
from trainer_models import (
    BEST,
    STEPS,
    TARGETS,
    base,
    logits,
    preferring,
    same_bits,
    trained,
    trainer,
)

from rankwise.integrations.peft import accelerate
from rankwise.integrations.transformers import AdaLoRACallback


def adapted(folder, by_us: bool = True):
    torch.manual_seed(1)
    config = peft.AdaLoraConfig(
        init_r=6, target_r=2, total_step=STEPS, tinit=2, tfinal=4, lora_alpha=12,
        target_modules=TARGETS, lora_dropout=0.1, task_type="SEQ_CLS",
    )  # fmt: skip
    model = peft.get_peft_model(base(folder / "base"), config)
    if by_us:
        accelerate(model)
    return model


@pytest.mark.parametrize("step", [2, 6, 8, 10])
def test_resuming_is_going_on(folder, step):
    whole, wanted = adapted(folder), AdaLoRACallback()
    trainer(whole, folder / "whole", [wanted]).train()
    assert wanted.allocator is whole.base_model.rankallocator
    assert wanted.allocator.steps == STEPS and wanted.allocator.frozen
    again, callback = adapted(folder), AdaLoRACallback()
    run = trainer(again, folder / "again", [callback])
    run.train(resume_from_checkpoint=str(folder / "whole" / f"checkpoint-{step}"))
    same_bits(trained(again), trained(whole))
    same_bits(callback.allocator.state_dict(), wanted.allocator.state_dict())
    assert again.peft_config["default"].rank_pattern == whole.peft_config["default"].rank_pattern


@pytest.mark.parametrize("best", [4, 8, 10])
def test_the_best_model_at_the_end_is_what_was_evaluated(folder, best):
    model = adapted(folder)
    run = trainer(model, folder / "run", [AdaLoRACallback()], preferring(best), **BEST)
    run.train()
    assert run.state.best_model_checkpoint.endswith(f"-{best}")
    assert torch.equal(logits(model), run.outputs[best])
    assert not torch.equal(run.outputs[best], run.outputs[STEPS])
    run.save_model(str(folder / "saved"))
    theirs = peft.PeftModel.from_pretrained(base(folder / "base"), folder / "saved")
    torch.testing.assert_close(logits(theirs), run.outputs[best], rtol=1e-5, atol=1e-6)


def test_the_ranks_are_written_once_at_the_end(folder):
    model = adapted(folder)
    trainer(model, folder / "run", [AdaLoRACallback()]).train()
    pattern = model.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) == 2 * len(pattern)
    stored = peft.AdaLoraConfig.from_pretrained(folder / "run" / f"checkpoint-{STEPS}")
    assert not stored.rank_pattern


def test_pefts_own_allocator_is_refused(folder):
    with pytest.raises(ValueError, match=r"rankwise.integrations.peft.accelerate\(model\) first"):
        trainer(adapted(folder, by_us=False), folder / "run", [AdaLoRACallback()]).train()


def test_pefts_models_have_a_penalty_of_their_own(folder):
    callback = AdaLoRACallback(orthogonality=0.1)
    with pytest.raises(ValueError, match="orthogonality must be 0 for PEFT's models"):
        trainer(adapted(folder), folder / "run", [callback]).train()


def test_what_it_logs(folder):
    run = trainer(adapted(folder), folder / "run", [AdaLoRACallback()])
    run.train()
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["adalora/rank_mean"] for entry in logs][-1] == 2
    assert all(entry["adalora/penalty"] > 0 for entry in logs)
