# What AdaLoRACallback refuses: schedules, models and trainings that it cannot run.
import pytest
import transformers
from callback_runs import adapted, ranks, run
from trainer_models import STEPS, base, trainer

import rankwise as rw
from rankwise.integrations.transformers import AdaLoRACallback


def test_beginning_anew_in_the_middle_is_refused(folder):
    model = adapted(folder)
    callback = AdaLoRACallback()

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 5

    made = trainer(model, folder / "run", [callback, Stop()])
    with pytest.warns(UserWarning, match=r"ended at step 5, before .* allocator.freeze"):
        made.train()
    with pytest.raises(RuntimeError, match="allocator has made 5 steps, the Trainer 0"):
        made.train()
    callback.allocator.freeze(None)
    assert sum(ranks(model)) == 2 * len(ranks(model))


def test_the_schedule_must_end_with_the_training(folder):
    model = adapted(folder)
    with pytest.raises(ValueError, match=f"total_steps {STEPS}, but the Trainer makes 10"):
        run(model, folder / "run", max_steps=10)
    epochs = dict(max_steps=-1, num_train_epochs=2)  # of 16 steps
    with pytest.warns(UserWarning, match=f"ends at total_steps {STEPS}; .* up to 32"):
        callback, _ = run(adapted(folder), folder / "run", **epochs)
    assert callback.allocator.frozen


def test_two_callbacks_are_refused(folder):
    made = trainer(adapted(folder), folder / "run", [AdaLoRACallback(), AdaLoRACallback()])
    with pytest.raises(ValueError, match="the Trainer has more than one"):
        made.train()


@pytest.mark.parametrize("name, said", [("deepspeed", "DeepSpeed .ZeRO."), ("fsdp", "FSDP")])
def test_what_holds_parts_of_parameters_is_refused(folder, name, said):
    made = trainer(adapted(folder), folder / "run", [AdaLoRACallback()])
    setattr(made.args, name, "on")
    with pytest.raises(ValueError, match=f"AdaLoRACallback: {said}"):
        made.callback_handler.on_train_begin(made.args, made.state, made.control)


def test_models_without_adalora_are_refused(folder):
    with pytest.raises(ValueError, match="AdaLoRACallback: the model has no adapters; call"):
        run(base(folder / "base"), folder / "run")
    lora = rw.apply_lora(base(folder / "base"), rw.LoRAConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="adalora_config: .* must have an AdaLoRA adapter"):
        run(lora, folder / "run")
