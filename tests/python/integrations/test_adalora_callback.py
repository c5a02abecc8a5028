# AdaLoRACallback: resuming, the best model, the schedule, logs, the penalty, what is refused.
import copy
import warnings

import pytest
import safetensors.torch
import torch
import transformers
from callback_runs import FREEZE, adapted, ranks, run
from trainer_models import (
    BEST,
    STEPS,
    adalora_config,
    arguments,
    base,
    logits,
    preferring,
    rows,
    same_bits,
    trained,
    trainer,
)

import rankwise as rw
from rankwise.integrations.transformers import AdaLoRACallback


def test_the_whole_schedule_is_run(folder):
    model = adapted(folder)
    callback, made = run(model, folder / "run")
    allocator = callback.allocator
    assert (allocator.steps, allocator.skipped_steps, allocator.frozen) == (STEPS, 0, True)
    assert sum(ranks(model)) == 2 * len(ranks(model)) == sum(allocator.ranks.values())


@pytest.mark.parametrize("given", [True, False])
def test_the_allocator_is_given_or_made(folder, given):
    model = adapted(folder)
    allocator = rw.RankAllocator(model, adalora_config()) if given else None
    callback, _ = run(model, folder / "run", AdaLoRACallback(allocator))
    assert (callback.allocator is allocator) == given
    alone = adapted(folder)
    beside = rw.RankAllocator(alone, adalora_config())

    class Attach(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, **_):
            beside.attach(optimizer)

    trainer(alone, folder / "alone", [Attach()]).train()
    same_bits(trained(model), trained(alone))
    assert callback.allocator.ranks == beside.ranks


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("step", [2, 6, FREEZE, 10])
def test_resuming_is_going_on(folder, step, accumulation, caplog):
    options = dict(gradient_accumulation_steps=accumulation)
    whole = adapted(folder)
    wanted, _ = run(whole, folder / "whole", **options)
    again = adapted(folder)
    callback = AdaLoRACallback()
    made = trainer(again, folder / "again", [callback], **options)
    made.train(resume_from_checkpoint=str(folder / "whole" / f"checkpoint-{step}"))
    same_bits(trained(again), trained(whole))
    same_bits(callback.allocator.state_dict(), wanted.allocator.state_dict())
    assert ranks(again) == ranks(whole)
    assert "missing keys" not in caplog.text
    for name in (f"checkpoint-{step + 2}", f"checkpoint-{STEPS}"):
        stored = [
            safetensors.torch.load_file(folder / side / name / "rank_allocator.safetensors")
            for side in ("whole", "again")
        ]
        same_bits(*stored)


def test_checkpoints_have_the_history_for_reports(folder):
    callback, _ = run(adapted(folder), folder / "run")
    history = rw.RankHistory.load(folder / "run" / f"checkpoint-{STEPS}" / "rank_history.json")
    assert history == rw.RankHistory.of(callback.allocator) and len(history.events) > 3


def test_resuming_in_the_same_process(folder):
    model = adapted(folder)
    callback, made = run(model, folder / "run")
    wanted = trained(model)
    made.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-4"))
    same_bits(trained(model), wanted)
    assert callback.allocator.steps == STEPS


def test_resuming_without_the_optimizers_state(folder):
    """Then the file beside the adapter has the allocator's."""
    model = adapted(folder)
    run(model, folder / "run", save_only_model=True)
    again = adapted(folder)
    callback = AdaLoRACallback()
    made = trainer(again, folder / "run", [callback])
    made.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-6"))
    assert callback.allocator.steps == STEPS and callback.allocator.frozen
    assert ranks(again) == ranks(model) or sum(ranks(again)) == sum(ranks(model))


def test_resuming_from_a_checkpoint_without_a_state_is_refused(folder):
    model = adapted(folder)
    allocator = rw.RankAllocator(model, adalora_config())
    made = trainer(model, folder / "run", [])
    optimizer = made.create_optimizer()
    allocator.attach(optimizer)
    made.train()
    again = adapted(folder)
    with pytest.raises(RuntimeError, match="allocator has made 0 steps, the Trainer 6"):
        trainer(again, folder / "other", [AdaLoRACallback()]).train(
            resume_from_checkpoint=str(folder / "run" / "checkpoint-6")
        )


@pytest.mark.parametrize("best", [4, FREEZE, 10])
def test_the_best_model_at_the_end_is_what_was_evaluated(folder, best):
    model = adapted(folder)
    callback = AdaLoRACallback()
    made = trainer(model, folder / "run", [callback], preferring(best), **BEST)
    made.train()
    assert made.state.best_model_checkpoint.endswith(f"-{best}")
    assert torch.equal(logits(model), made.outputs[best])
    assert not torch.equal(made.outputs[best], made.outputs[STEPS])
    assert callback.allocator.steps == best
    assert callback.allocator.frozen == (best >= FREEZE)
    made.save_model(str(folder / "saved"))
    fresh = base(folder / "base")
    rw.load_adapter(fresh, folder / "saved")
    torch.testing.assert_close(logits(fresh), made.outputs[best], rtol=1e-6, atol=1e-6)


def test_training_twice_counts_no_step_twice(folder):
    model = adapted(folder)
    callback, made = run(model, folder / "run")
    final = ranks(model)
    made.train()
    assert callback.allocator.frozen and ranks(model) == final
    assert callback.allocator.steps == 2 * STEPS
    assert len(made.optimizer.optimizer._optimizer_step_post_hooks) == 0
    assert len(made.optimizer.optimizer._optimizer_state_dict_post_hooks) == 0


class Recorder(transformers.TrainerCallback):
    """Stands for a logger."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **_):
        self.logs.append(dict(logs))


@pytest.mark.parametrize("first", [True, False])
def test_loggers_get_budget_ranks_and_penalty(folder, first):
    model, recorder, callback = adapted(folder), Recorder(), AdaLoRACallback()
    order = [recorder, callback] if first else [callback, recorder]
    made = trainer(model, folder / "run", order, eval_steps=6, eval_strategy="steps")
    made.train()
    keys = {"adalora/budget", "adalora/rank_mean", "adalora/penalty"}
    training = [logs for logs in recorder.logs if "loss" in logs]
    assert len(training) == STEPS and all(keys <= logs.keys() for logs in training)
    schedule = callback.allocator.schedule
    budgets = [schedule.budget(step) for step in range(1, STEPS + 1)]
    assert [logs["adalora/budget"] for logs in training] == budgets
    assert training[0]["adalora/rank_mean"] == 6 and training[-1]["adalora/rank_mean"] == 2
    assert all(logs["adalora/penalty"] > 0 for logs in training)
    assert not any(keys & logs.keys() for logs in recorder.logs if "loss" not in logs)
    history = [logs for logs in made.state.log_history if "loss" in logs]
    assert all(keys <= logs.keys() for logs in history)


@pytest.mark.parametrize("form", ["squared_sum", "mean_norm"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_penalty_is_trained_whatever_the_loss(folder, form, accumulation):
    """One step of SGD: the difference of two trainings is the penalty's gradient."""
    found = []
    options = dict(
        max_steps=1, optim="sgd", learning_rate=0.5, max_grad_norm=0.0,
        lr_scheduler_type="constant",
        gradient_accumulation_steps=accumulation, label_smoothing_factor=0.1,
    )  # fmt: skip
    schedule = dict(total_steps=1, warmup_steps=0, final_steps=0, target_rank=6, dropout=0.0)
    for weight in (0.0, 0.25):
        model = adapted(folder, **schedule)
        before = rw.RankAllocator(model, adalora_config(**schedule))
        penalty = before.orthogonality_penalty(form)
        names = [name for name in trained(model) if not name.endswith("lora_E")]
        factors = [model.get_parameter(name) for name in names]
        gradients = dict(zip(names, torch.autograd.grad(penalty, factors), strict=True))
        callback = AdaLoRACallback(before, weight, form)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one step chooses nothing
            run(model, folder / "run", callback, **options)
        found.append(trained(model))
    for name, gradient in gradients.items():
        got = (found[0][name] - found[1][name]) / (0.5 * 0.25)
        torch.testing.assert_close(got, gradient, rtol=1e-3, atol=1e-3)


def test_evaluation_has_no_penalty(folder):
    model = adapted(folder)
    made = trainer(model, folder / "run", [AdaLoRACallback(orthogonality=1e3)], max_steps=STEPS)
    plain = trainer(model, folder / "plain", [])
    assert made.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


def test_a_new_model_has_a_new_allocator(folder):
    callback = AdaLoRACallback()
    made = transformers.Trainer(
        model_init=lambda: adapted(folder), args=arguments(folder / "run"),
        train_dataset=rows(64), callbacks=[callback],
    )  # fmt: skip
    made.train()
    first, found = callback.allocator, trained(made.model)
    made.train()
    assert callback.allocator is not first and callback.allocator.steps == STEPS
    same_bits(trained(made.model), found)


def test_it_has_no_state_that_a_trainer_would_make_it_anew_from():
    from transformers.trainer_callback import ExportableState

    assert not isinstance(AdaLoRACallback(), ExportableState)


def test_the_option_that_restores_callbacks_changes_nothing(folder):
    model = adapted(folder)
    options = dict(restore_callback_states_from_checkpoint=True)
    run(model, folder / "whole", **options)
    again = adapted(folder)
    callback = AdaLoRACallback()
    made = trainer(again, folder / "again", [callback], **options)
    made.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-6"))
    assert callback in made.callback_handler.callbacks
    same_bits(trained(again), trained(model))


def test_patterns_that_peft_cannot_hold_are_exported(folder):
    model = adapted(folder, rank_pattern={"value": 3}, target_rank=3)
    callback, _ = run(model, folder / "run")
    fresh = base(folder / "base")
    rw.load_adapter(fresh, folder / "run" / f"checkpoint-{STEPS}")
    torch.testing.assert_close(logits(fresh), logits(model), rtol=1e-5, atol=1e-6)
    again = copy.deepcopy(model)
    assert ranks(again) == ranks(model)
