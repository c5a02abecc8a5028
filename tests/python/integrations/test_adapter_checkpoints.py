# A Trainer with AdapterCallback: what its checkpoints hold, resuming, the best model at the end.
import copy
import json
import pickle
import shutil

import peft
import pytest
import safetensors.torch
import torch
import transformers
from torch import nn
from trainer_models import (
    BEST,
    STEPS,
    arguments,
    base,
    logits,
    lora_config,
    preferring,
    rows,
    same_bits,
    trained,
    trainer,
)

import rankwise as rw
from rankwise.integrations.transformers import AdapterCallback


def adapted(folder, **options):
    torch.manual_seed(1)
    return rw.apply_lora(base(folder / "base"), lora_config(**options))


def sizes(folder) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir()}


HEAD = dict(modules_to_save=["classifier"])


@pytest.mark.parametrize("options", [{}, HEAD], ids=["factors", "head"])
def test_checkpoints_hold_the_adapter_alone(folder, options):
    model = adapted(folder, **options)
    run = trainer(model, folder / "run", [AdapterCallback()], save_steps=STEPS)
    run.train()
    checkpoint = folder / "run" / f"checkpoint-{STEPS}"
    found = sizes(checkpoint)
    assert {"adapter_config.json", "adapter_model.safetensors", "model.safetensors"} <= set(found)
    assert "config.json" not in found
    stored = safetensors.torch.load_file(checkpoint / "model.safetensors")
    same_bits(stored, trained(model))
    wanted = logits(model)
    fresh = base(folder / "base")
    rw.load_adapter(fresh, checkpoint)
    assert torch.equal(logits(fresh), wanted)
    theirs = peft.PeftModel.from_pretrained(base(folder / "base"), checkpoint)
    torch.testing.assert_close(logits(theirs), wanted, rtol=1e-5, atol=1e-6)
    auto = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoint)
    if not options:  # transformers reads no modules_to_save
        torch.testing.assert_close(logits(auto), wanted, rtol=1e-5, atol=1e-6)


def test_save_model_and_save_pretrained(folder):
    model = adapted(folder)
    run = trainer(model, folder / "run", [AdapterCallback()])
    run.save_model(str(folder / "saved"))
    model.save_pretrained(folder / "again")
    model.save_pretrained(folder / "nothing", is_main_process=False)
    assert not (folder / "nothing").exists()
    for name in ("saved", "again"):
        fresh = base(folder / "base")
        rw.load_adapter(fresh, folder / name)
        assert torch.equal(logits(fresh), logits(model))
    with pytest.raises(ValueError, match=r"model.push_to_hub\(repo_id\)"):
        model.save_pretrained(folder / "pushed", push_to_hub=True)


@pytest.mark.parametrize("how", [rw.merge, rw.unload])
def test_without_adapters_the_plain_model_is_saved(folder, how):
    model = adapted(folder)
    trainer(model, folder / "run", [AdapterCallback()], max_steps=2).train()
    wanted = logits(model) if how is rw.merge else logits(base(folder / "base"))
    how(model)
    model.save_pretrained(folder / "plain")
    if how is rw.unload:
        assert model.load_state_dict({}, strict=False).missing_keys
    assert "config.json" in sizes(folder / "plain")
    torch.testing.assert_close(logits(base(folder / "plain")), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_save_themselves(folder, twin_of):
    model = adapted(folder)
    trainer(model, folder / "run", [AdapterCallback()], max_steps=2).train()
    twin = twin_of(model)
    with torch.no_grad():
        for parameter in trained(twin):
            twin.get_parameter(parameter).normal_(std=0.1)
    twin.save_pretrained(folder / "twin")
    fresh = base(folder / "base")
    rw.load_adapter(fresh, folder / "twin")
    assert torch.equal(logits(fresh), logits(twin))
    assert not torch.equal(logits(fresh), logits(model))


@pytest.mark.parametrize("options", [{}, HEAD], ids=["factors", "head"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_resuming_is_going_on(folder, options, accumulation, caplog):
    steps = dict(gradient_accumulation_steps=accumulation)
    whole = adapted(folder, **options)
    trainer(whole, folder / "whole", [AdapterCallback()], **steps).train()
    again = adapted(folder, **options)
    run = trainer(again, folder / "again", [AdapterCallback()], **steps)
    run.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-6"))
    assert run.state.global_step == STEPS
    same_bits(trained(again), trained(whole))
    assert "missing keys" not in caplog.text


def test_resuming_brings_the_first_factors(folder, caplog):
    """Those of the model that goes on are others."""

    def begun(seed):
        first = rw.PiSSA(iterations=0, seed=seed)
        return rw.apply_lora(base(folder / "base"), lora_config(), first_values=first)

    whole, again = begun(0), begun(1)
    trainer(whole, folder / "whole", [AdapterCallback()]).train()
    run = trainer(again, folder / "again", [AdapterCallback()])
    run.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-6"))
    same_bits(trained(again), trained(whole))
    assert torch.equal(logits(again), logits(whole))
    assert "missing keys" not in caplog.text
    checkpoint = folder / "whole" / f"checkpoint-{STEPS}"
    theirs = peft.PeftModel.from_pretrained(base(folder / "base"), checkpoint)
    torch.testing.assert_close(logits(theirs), logits(whole), rtol=1e-5, atol=1e-5)


def test_resuming_the_last_one_by_itself(folder):
    whole = adapted(folder)
    trainer(whole, folder / "run", [AdapterCallback()]).train()
    for step in range(8, STEPS + 1, 2):
        shutil.rmtree(folder / "run" / f"checkpoint-{step}")
    again = adapted(folder)
    trainer(again, folder / "run", [AdapterCallback()]).train(resume_from_checkpoint=True)
    same_bits(trained(again), trained(whole))


@pytest.mark.parametrize("options", [{}, HEAD], ids=["factors", "head"])
def test_the_best_model_at_the_end(folder, options):
    model = adapted(folder, **options)
    run = trainer(model, folder / "run", [AdapterCallback()], preferring(4), **BEST)
    run.train()
    assert run.state.best_model_checkpoint.endswith("-4")
    assert torch.equal(logits(model), run.outputs[4])
    assert not torch.equal(run.outputs[4], run.outputs[STEPS])


def test_other_states_are_loaded_as_before(folder):
    model = adapted(folder)
    trainer(model, folder / "run", [AdapterCallback()], max_steps=2).train()
    other = adapted(folder)
    for name in ("default", None):
        for each in (model, other):
            rw.activate_adapter(each, name)
        wanted = other.load_state_dict({}, strict=False)
        assert wanted.missing_keys and model.load_state_dict({}, strict=False) == wanted
        with pytest.raises(RuntimeError, match="Missing key"):
            model.load_state_dict({})
    with pytest.raises(ValueError, match=r"save_adapter: adapters are \['default'\], got None"):
        model.save_pretrained(folder / "none")


class Plain(nn.Module):
    """No PreTrainedModel, but it has one inside."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, labels=None):
        found = self.inner(input_ids=input_ids, labels=labels)
        return {"loss": found.loss, "logits": found.logits}


def test_a_plain_module(folder):
    whole = Plain(adapted(folder))
    trainer(whole, folder / "whole", [AdapterCallback()]).train()
    checkpoint = folder / "whole" / "checkpoint-6"
    stored = safetensors.torch.load_file(checkpoint / "model.safetensors")
    assert stored.keys() == trained(whole).keys()
    again = Plain(adapted(folder))
    run = trainer(again, folder / "again", [AdapterCallback()])
    run.train(resume_from_checkpoint=str(checkpoint))
    same_bits(trained(again), trained(whole))
    whole.inner.save_pretrained(folder / "inner")  # as sentence-transformers does
    fresh = base(folder / "base")
    rw.load_adapter(fresh, folder / "inner")
    assert torch.equal(logits(fresh), logits(whole.inner))


def test_a_model_made_by_the_trainer(folder):
    args = arguments(folder / "run", max_steps=2)
    run = transformers.Trainer(
        model_init=lambda: adapted(folder), args=args, train_dataset=rows(8),
        callbacks=[AdapterCallback()],
    )  # fmt: skip
    run.train()
    stored = json.loads((folder / "run" / "checkpoint-2" / "adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == str(folder / "base")
    assert "config.json" not in sizes(folder / "run" / "checkpoint-2")


class FusedHead(transformers.Trainer):
    """Its loss multiplies by the head's weight by itself, as TRL's fused output layer does."""

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        hidden = model.bert(input_ids=inputs["input_ids"]).last_hidden_state[:, 0]
        loss = nn.functional.cross_entropy(hidden @ model.classifier.weight.t(), inputs["labels"])
        return (loss, {}) if return_outputs else loss


def test_what_the_loss_passes_over_is_told(folder, recwarn):
    trainer(adapted(folder), folder / "run", [AdapterCallback()], max_steps=2).train()
    assert not [w for w in recwarn if "no gradient" in str(w.message)]
    model = adapted(folder, target_modules=["query", "classifier"])
    run = trainer(model, folder / "run", [AdapterCallback()], FusedHead, max_steps=2)
    with pytest.warns(
        UserWarning, match="no gradient reached classifier.lora_A, classifier.lora_B"
    ):
        run.train()


def test_models_without_adapters_are_refused(folder):
    run = trainer(base(folder / "base"), folder / "run", [AdapterCallback()])
    with pytest.raises(ValueError, match="AdapterCallback: the model has no adapters; call"):
        run.train()
    run.save_model(str(folder / "saved"))
    assert "config.json" in sizes(folder / "saved")


@pytest.mark.parametrize("name, said", [("deepspeed", "DeepSpeed .ZeRO."), ("fsdp", "FSDP")])
def test_what_holds_parts_of_parameters_is_refused(folder, name, said):
    run = trainer(adapted(folder), folder / "run", [])
    setattr(run.args, name, "on")
    with pytest.raises(ValueError, match=f"AdapterCallback: {said}"):
        AdapterCallback().on_train_begin(run.args, run.state, run.control, model=run.model)
