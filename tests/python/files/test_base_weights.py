"""Weights of the base in PEFT's folders: adapted, resized and tied embeddings, trained heads."""

import copy
import re

import peft
import pytest
import safetensors.torch
import torch
import transformers
from file_models import IDS, output, refuses
from tied_bases import BASES, llama

import rankwise as rw

TABLE, HEAD = "model.embed_tokens", "lm_head"


TABLES = r"(lm_head|.*(embed_tokens|wte|shared|word_embeddings|predictions\.decoder)).*weight"
# base, PEFT's options, save_embedding_layers
FOLDERS = {
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}, "auto"),
    "head": ("llama", {"target_modules": ["q_proj", "lm_head"]}, "auto"),
    "tied embedding": ("tied llama", {"target_modules": ["q_proj", "embed_tokens"]}, "auto"),
    "tied head": ("tied llama", {"target_modules": ["q_proj", "lm_head"]}, "auto"),
    "both tied ends": ("tied llama", {"target_modules": ["embed_tokens", "lm_head"]}, "auto"),
    "by expression": ("tied llama", {"target_modules": r".*(q_proj|embed_tokens)"}, "auto"),
    "not adapted": ("llama", {"target_modules": ["q_proj"]}, True),
    "tied, not adapted": ("tied llama", {"target_modules": ["q_proj"]}, True),
    "trained whole": (
        "tied llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, "auto",
    ),
    "trained whole, and the layers": (
        "tied llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, True,
    ),
    "both trained whole": (
        "tied llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, True,
    ),
    "head trained whole": (
        "tied llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True,
    ),
    "one whole, one adapted": (
        "tied llama", {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]}, "auto",
    ),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}, True),
    "gpt2, whole": (
        "gpt2",
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "modules_to_save": ["wte"]}, True,
    ),
    "bert": ("bert", {"target_modules": ["query", "word_embeddings", "decoder"]}, True),
    "bert, whole": ("bert", {"target_modules": ["query"], "modules_to_save": ["decoder"]}, True),
    "bert, larger wholes": (
        "bert",
        {"target_modules": ["query"], "modules_to_save": ["bert.embeddings", "cls"]}, True,
    ),
    "t5": ("t5", {"target_modules": ["q", "embed_tokens"]}, True),
    "t5, whole": (
        "t5", {"target_modules": ["q"], "modules_to_save": ["shared", "embed_tokens"]}, True,
    ),
    "AdaLoRA": (
        "tied llama",
        {"target_modules": ["q_proj", "lm_head"], "total_step": 9, "init_r": 3}, "auto",
    ),
}  # fmt: skip


def peft_folder(folder, base, options, layers, changed: bool) -> torch.Tensor:
    """Saves an adapter trained over the base, or over other embeddings; what PEFT computes."""
    kind = peft.AdaLoraConfig if "total_step" in options else peft.LoraConfig
    theirs = peft.get_peft_model(BASES[base](), kind(**options))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad or (changed and re.search(TABLES, name)):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    theirs.save_pretrained(folder, save_embedding_layers=layers)
    return peft_output(base, folder)


def peft_output(base: str, folder) -> torch.Tensor:
    return output(peft.PeftModel.from_pretrained(BASES[base](), folder).eval())


def assert_base(model: torch.nn.Module, plain: torch.nn.Module) -> None:
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())


@pytest.mark.parametrize("changed", [False, True], ids=["the model's", "other"])
@pytest.mark.parametrize("base, options, layers", FOLDERS.values(), ids=FOLDERS)
def test_the_same_function_as_in_peft_and_back(tmp_path, base, options, layers, changed):
    wanted = peft_folder(tmp_path, base, options, layers, changed)
    plain, model = BASES[base](), BASES[base]()
    parameters = dict(model.named_parameters())
    assert rw.load_adapter(model, tmp_path) == rw.LoadReport(
        base=rw.load_adapter(BASES[base](), tmp_path).base if changed else []
    )

    def computes(found: torch.Tensor) -> None:
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)

    computes(output(model))
    computes(output(copy.deepcopy(model)))
    with rw.disable_adapters(model):
        assert torch.equal(output(model), output(plain))
    rw.merge(model)
    computes(output(model))
    with rw.disable_adapters(model):
        assert torch.equal(output(model), output(plain))
    rw.unmerge(model)

    rw.save_adapter(model, tmp_path / "ours")
    computes(peft_output(base, tmp_path / "ours"))
    again = BASES[base]()
    rw.load_adapter(again, tmp_path / "ours")
    assert torch.equal(output(again), output(model))
    rw.export_lora(model, tmp_path / "plain")
    computes(peft_output(base, tmp_path / "plain"))
    rw.load_adapter(model, tmp_path)  # into the adapter that is there
    computes(output(model))

    rw.activate_adapter(model, None)
    assert_base(model, plain)
    assert all(parameter is parameters[name] for name, parameter in _base_of(model).items())


def _base_of(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if "lora_" not in n}


def test_nothing_is_replaced_where_the_folder_has_the_models_own(tmp_path):
    peft_folder(tmp_path, *FOLDERS["tied embedding"], changed=False)
    model = llama(True)
    weight = model.lm_head.weight
    rw.load_adapter(model, tmp_path)
    assert model.lm_head.weight is weight and model.model.embed_tokens.weight is weight


def test_each_adapter_computes_over_its_own_base(tmp_path):
    model = llama(True)
    config = rw.LoRAConfig(rank=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    rw.apply_lora(model, config, "whole")
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(0.1)
    outputs = {"whole": output(model), None: output(llama(True))}
    for name in ("tied head", "tied, not adapted"):
        outputs[name] = peft_folder(tmp_path / name, *FOLDERS[name], changed=True)
        rw.load_adapter(model, tmp_path / name, name=name)
    rw.add_adapter(model, "new", config)  # copies the base's, not that of the active adapter
    rw.activate_adapter(model, "new")
    assert torch.equal(model.model.embed_tokens.weight, llama(True).lm_head.weight)
    for name in (*outputs, *reversed(outputs)):
        rw.activate_adapter(model, name)
        torch.testing.assert_close(output(model), outputs[name], rtol=0, atol=2e-6)
    rw.delete_adapter(model, "tied, not adapted")
    rw.activate_adapter(model, "tied head")
    rw.delete_adapter(model, "tied head")
    assert_base(model, llama(True))


def test_a_move_of_the_model_reaches_what_waits(tmp_path):
    peft_folder(tmp_path, *FOLDERS["tied embedding"], changed=True)
    model = llama(True)
    rw.load_adapter(model, tmp_path)
    model.double()
    for name in (None, "default", None):
        rw.activate_adapter(model, name)
        assert {p.dtype for n, p in model.named_parameters()} == {torch.float64}
        output(model)
    assert_base(model, llama(True).double())


@pytest.mark.parametrize("name", ["not adapted", "tied head", "tied embedding"])
def test_a_stored_base_is_not_trained(tmp_path, name):
    peft_folder(tmp_path, *FOLDERS[name], changed=True)
    model = BASES[FOLDERS[name][0]]()
    rw.load_adapter(model, tmp_path)
    model(IDS)[0].square().sum().backward()
    assert rw.health_check(model).ok
    assert {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n} == set()


def edit(folder, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


def key(path: str) -> str:
    return f"base_model.model.{path}.weight"


@pytest.mark.parametrize("name", ["tied embedding", "not adapted", "trained whole"])
def test_a_resized_vocabulary_is_told_with_the_way_out(tmp_path, name):
    peft_folder(tmp_path, *FOLDERS[name], changed=True)
    model = BASES[FOLDERS[name][0]]()
    model.resize_token_embeddings(43, mean_resizing=False)
    found = r"embed_tokens.*weight: must be \[43, 16\], got \[40, 16\]; resize the model's vocab"
    refuses(model, tmp_path, found)


def test_tied_ends_that_differ_in_the_file(tmp_path):
    peft_folder(tmp_path, *FOLDERS["tied, not adapted"], changed=True)
    edit(tmp_path, lambda tensors: tensors[key(HEAD)].add_(1))
    refuses(llama(True), tmp_path, rf"{TABLE}.weight: differs from .*{HEAD}.weight.*tied in the")


def test_weights_of_modules_that_the_model_lacks(tmp_path):
    peft_folder(tmp_path, *FOLDERS["embedding"], changed=False)

    def rename(tensors):
        tensors[key("model.other.base_layer")] = tensors.pop(key(f"{TABLE}.base_layer"))

    edit(tmp_path, rename)
    refuses(llama(False), tmp_path, "has no module 'model.other.base_layer'")


def test_folders_of_old_peft_name_an_adapted_embeddings_weight_without_base_layer(tmp_path):
    wanted = peft_folder(tmp_path, *FOLDERS["tied embedding"], changed=True)
    edit(tmp_path, lambda t: t.update({key(TABLE): t.pop(key(f"{TABLE}.base_layer"))}))
    model = llama(True)
    assert rw.load_adapter(model, tmp_path).base == [key(TABLE)]
    torch.testing.assert_close(output(model), wanted, rtol=0, atol=2e-6)


def test_dtypes_of_a_stored_base(tmp_path):
    peft_folder(tmp_path / "same", *FOLDERS["embedding"], changed=False)
    model = llama(False).bfloat16()
    assert rw.load_adapter(model, tmp_path / "same").base == []  # rounded, it is the model's
    peft_folder(tmp_path / "other", *FOLDERS["embedding"], changed=True)
    refuses(llama(False).bfloat16(), tmp_path / "other", "base_layer.weight: .* would be rounded")
    edit(tmp_path / "other", lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    model = llama(False)
    with pytest.warns(UserWarning, match="base_layer.weight is torch.bfloat16 and becomes"):
        rw.load_adapter(model, tmp_path / "other")
    assert model.model.embed_tokens.weight.dtype == torch.float32


def distilbert() -> torch.nn.Module:
    torch.manual_seed(1)
    sizes = {"vocab_size": 40, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24}
    config = transformers.DistilBertConfig(**sizes)
    return transformers.DistilBertForSequenceClassification(config).eval()


def test_endings_within_a_word_are_trained_whole_as_in_peft(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_lin"], task_type="SEQ_CLS")
    theirs = peft.get_peft_model(distilbert(), config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    theirs.save_pretrained(tmp_path)
    model = distilbert()
    rw.load_adapter(model, tmp_path)
    assert model.pre_classifier.weight.requires_grad
    torch.testing.assert_close(output(model), output(theirs), rtol=0, atol=1e-6)


def test_peft_finds_the_modules_it_looks_for_in_ours(tmp_path):
    config = rw.LoRAConfig(rank=2, target_modules=["q_lin"], modules_to_save=["classifier"])
    model = rw.apply_lora(distilbert(), config)
    with torch.no_grad():
        model.classifier.weight.normal_()
    rw.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(distilbert(), tmp_path).eval()
    torch.testing.assert_close(output(theirs), output(model), rtol=0, atol=1e-6)
    again = distilbert()
    rw.load_adapter(again, tmp_path)
    assert torch.equal(output(again), output(model))
    assert not again.pre_classifier.weight.requires_grad
