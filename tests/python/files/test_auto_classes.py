# PEFT's and transformers' auto classes read saved folders, and find the base model by themselves.
import json

import peft
import pytest
import torch
import transformers
from file_models import IDS, randomise

import rankwise as rw

SIZES = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2)


def llama(folder) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        **SIZES, num_attention_heads=2, num_key_value_heads=1, bos_token_id=0, eos_token_id=0
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return transformers.LlamaForCausalLM.from_pretrained(folder)


def minilm(folder) -> transformers.PreTrainedModel:
    transformers.BertModel(
        transformers.BertConfig(**SIZES, num_attention_heads=2, max_position_embeddings=32)
    ).save_pretrained(folder)
    return transformers.BertModel.from_pretrained(folder)


def classifier(folder) -> transformers.PreTrainedModel:
    transformers.BertForSequenceClassification(
        transformers.BertConfig(**SIZES, num_attention_heads=2, max_position_embeddings=32)
    ).save_pretrained(folder)
    return transformers.BertForSequenceClassification.from_pretrained(folder)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def config(method: str, targets: list[str], **options) -> rw.LoRAConfig | rw.AdaLoRAConfig:
    if method == "LoRA":
        return rw.LoRAConfig(rank=4, target_modules=targets, **options)
    return rw.AdaLoRAConfig(target_modules=targets, total_steps=9, **options)


def saved(build, tmp_path, config, task: str | None = None) -> tuple[torch.Tensor, dict]:
    """(what the adapted model computes, its adapter_config.json), saved under `adapter`."""
    model = rw.apply_lora(build(tmp_path / "base").eval(), config)
    randomise(model)
    rw.save_adapter(model, tmp_path / "adapter", task_type=task)
    with torch.no_grad():
        found = model(IDS)[0]
    return found, json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())


def same(model: torch.nn.Module, wanted: torch.Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(input_ids=IDS)[0], wanted, rtol=1e-5, atol=1e-5)


CAUSAL = (llama, "CAUSAL_LM", peft.AutoPeftModelForCausalLM, dict(targets=["q_proj", "v_proj"]))
FEATURES = (
    minilm, "FEATURE_EXTRACTION", peft.AutoPeftModelForFeatureExtraction, dict(targets=["query"])
)  # fmt: skip
CLASSES = (
    classifier, "SEQ_CLS", peft.AutoPeftModelForSequenceClassification,
    dict(targets=["query"], modules_to_save=["classifier"]),
)  # fmt: skip
CASES = pytest.mark.parametrize("case", [CAUSAL, FEATURES, CLASSES], ids=lambda case: case[1])


@pytest.mark.parametrize("method", ["LoRA", "AdaLoRA"])
@CASES
def test_without_a_task_the_class_is_named(tmp_path, case, method):
    build, _, auto, options = case
    wanted, stored = saved(build, tmp_path, config(method, **options))
    base = build(tmp_path / "other")
    kind = type(base)
    assert stored["auto_mapping"] == {
        "base_model_class": kind.__name__, "parent_library": kind.__module__
    }  # fmt: skip
    assert stored["task_type"] is None
    theirs = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "query"]))
    theirs.save_pretrained(tmp_path / "theirs")
    as_peft = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    assert stored["auto_mapping"] == as_peft["auto_mapping"]
    for cls in (auto, peft.AutoPeftModel):
        same(cls.from_pretrained(tmp_path / "adapter"), wanted)


@pytest.mark.parametrize("method", ["LoRA", "AdaLoRA"])
@CASES
def test_with_a_task(tmp_path, case, method):
    build, task, auto, options = case
    wanted, stored = saved(build, tmp_path, config(method, **options), task)
    assert (stored["task_type"], stored["auto_mapping"]) == (task, None)
    loaded = auto.from_pretrained(tmp_path / "adapter")
    assert loaded.peft_config["default"].task_type == task
    same(loaded, wanted)


def test_transformers_finds_the_base_too(tmp_path):
    wanted, _ = saved(llama, tmp_path, config("LoRA", ["q_proj"]))
    same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"), wanted)


def test_the_version_is_the_formats(tmp_path):
    _, stored = saved(minilm, tmp_path, config("LoRA", ["query"]))
    assert stored["peft_version"] == "0.21.2"
    assert peft.PeftConfig.from_pretrained(tmp_path / "adapter").peft_version == "0.21.2"


@pytest.mark.parametrize("write", [rw.save_adapter, rw.export_lora])
@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_what_a_folder_says_is_kept(tmp_path, write, task):
    saved(llama, tmp_path, config("AdaLoRA", ["q_proj"]), task)
    model = llama(tmp_path / "base")
    rw.load_adapter(model, tmp_path / "adapter", name="loaded")
    write(model, tmp_path / "again")
    stored = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert stored["task_type"] == task
    assert (stored["auto_mapping"] is None) == (task is not None)


def test_wrapped_models_are_named_by_what_is_inside(tmp_path):
    model = rw.apply_lora(llama(tmp_path / "base"), config("LoRA", ["q_proj"]))
    rw.save_adapter(torch.nn.DataParallel(torch.compile(model)), tmp_path / "adapter")
    stored = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert stored["auto_mapping"]["base_model_class"] == "LlamaForCausalLM"


@pytest.mark.parametrize("write", [rw.save_adapter, rw.export_lora])
@pytest.mark.parametrize("task", ["causal_lm", "", 3])
def test_unknown_tasks(tmp_path, write, task):
    model = rw.apply_lora(minilm(tmp_path / "base"), config("LoRA", ["query"]))
    with pytest.raises(ValueError, match="task_type must be None or one of .*'CAUSAL_LM'.*got"):
        write(model, tmp_path / "adapter", task_type=task)
    assert not (tmp_path / "adapter").exists()
