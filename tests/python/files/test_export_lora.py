"""export_lora: any adapter as plain LoRA that every reader understands as the same function."""

import json

import peft
import pytest
import torch
from file_models import bert, gpt2, layers_of, output, prune, randomise
from safetensors.torch import load_file
from torch import nn

import rankwise as rw


def lora(base=bert, **options) -> nn.Module:
    options = {"rank": 4, "alpha": 6.0, "target_modules": ["query", "dense"], **options}
    model = rw.apply_lora(base(), rw.LoRAConfig(**options)).eval()
    randomise(model)
    return model


def adalora(base=bert, ranks=(), **options) -> nn.Module:
    options = {
        "initial_rank": 4,
        "target_rank": 2,
        "total_steps": 10,
        "target_modules": ["value"],
        **options,
    }
    model = rw.apply_lora(base(), rw.AdaLoRAConfig(**options)).eval()
    randomise(model, std=0.4)
    for layer, rank in zip(layers_of(model).values(), ranks, strict=False):
        prune(layer, rank)
    return model


def mixture() -> nn.Module:
    """LoRA, rsLoRA, AdaLoRA and an embedding in one adapter, which save_adapter refuses."""
    model = bert()
    layers = {
        "encoder.layer.0.attention.self.query": (rw.nn.LoRALinear.from_linear, {"rslora": True}),
        "encoder.layer.0.attention.self.key": (rw.nn.LoRALinear.from_linear, {"rank": 2}),
        "encoder.layer.1.attention.self.query": (rw.nn.AdaLoRALinear.from_linear, {"rank": 5}),
        "embeddings.word_embeddings": (rw.nn.LoRAEmbedding.from_embedding, {"rank": 3}),
    }
    model.requires_grad_(False)
    for path, (wrap, options) in layers.items():
        model.set_submodule(path, wrap(model.get_submodule(path), **options))
    randomise(model)
    return model


def assert_same_function(theirs: nn.Module, ours: nn.Module) -> None:
    """In float64, so that the files' roundings alone remain, not those of two ways to multiply."""
    torch.testing.assert_close(output(theirs.double()), output(ours.double()), rtol=0, atol=1e-6)


ADAPTERS = {
    "lora": (lambda: lora(), 4),
    "patterns": (
        lambda: lora(
            rank_pattern={"query": 2, "layer.1.output.dense": 7, "layer.0.output.dense": 0},
            alpha_pattern={"layer.0.attention.self.query": 3.0},
        ),
        7,
    ),
    "rslora": (lambda: lora(rslora=True), 4),
    "embedding": (lambda: lora(target_modules=["word_embeddings", "value"]), 4),
    "whole modules": (lambda: lora(modules_to_save=["embeddings.LayerNorm"]), 4),
    "adalora": (lambda: adalora(), 4),
    "adalora pruned": (lambda: adalora(ranks=(3, 0, 2, 1), target_modules=["query", "dense"]), 4),
    "adalora with one layer left": (lambda: adalora(ranks=(0, 2)), 2),
    "adalora with patterns": (
        lambda: adalora(rank_pattern={"layer.1.*": 2}, alpha_pattern={"layer.1.*": 5.0}),
        4,
    ),
    "mixture": (mixture, 8),
}


@pytest.mark.parametrize("make, rank", ADAPTERS.values(), ids=ADAPTERS)
def test_stock_peft_computes_the_same(tmp_path, make, rank):
    model = make()
    rw.export_lora(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(bert(), tmp_path).eval()
    assert_same_function(theirs, model)
    assert (output(model) - output(bert())).abs().max() > 1e-3

    config = theirs.peft_config["default"]
    assert (config.peft_type, config.r, config.lora_alpha) == (peft.PeftType.LORA, rank, rank)
    assert (config.rank_pattern, config.alpha_pattern, config.use_rslora) == ({}, {}, False)
    # llama.cpp scales by lora_alpha over each tensor's own rank, vLLM by lora_alpha / r for all.
    for key, tensor in load_file(tmp_path / "adapter_model.safetensors").items():
        if "lora_A" in key or "embedding_A" in key:
            assert tensor.shape[0] == rank, key
        if "lora_B" in key or "embedding_B" in key:
            assert tensor.shape[1] == rank, key


def test_conv1d(tmp_path):
    model = adalora(gpt2, ranks=(3, 0), target_modules=["c_attn", "c_fc"])
    rw.export_lora(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(gpt2(), tmp_path).eval()
    assert_same_function(theirs, model)


def test_in_float64_only_the_last_digits_differ(tmp_path):
    model = adalora(lambda: bert().double(), ranks=(3, 1), alpha=1.0, initial_rank=3)
    rw.export_lora(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(bert().double(), tmp_path).eval()
    torch.testing.assert_close(output(theirs), output(model), rtol=0, atol=1e-13)


def test_layers_of_rank_0_are_not_targets(tmp_path):
    def targets(model):
        rw.export_lora(model, tmp_path)
        return json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]

    assert targets(adalora(ranks=(0, 2))) == ["encoder.layer.1.attention.self.value"]
    assert targets(adalora(ranks=(1, 2))) == ["value"]


def test_we_read_it_back_in_every_dtype(tmp_path):
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        model = adalora(lambda dtype=dtype: bert().to(dtype), ranks=(3, 1), adapter_dtype=dtype)
        rw.export_lora(model, tmp_path)
        again = bert().to(dtype)
        rw.load_adapter(again, tmp_path)
        for name, layer in layers_of(again).items():
            original = layers_of(model)[name]
            rank = original.rank
            B = original.lora_B[:, :rank].double() * original.lora_E[:rank, 0].double()
            torch.testing.assert_close(
                layer.lora_B[:, :rank].double(),
                original.scaling * B,
                rtol=torch.finfo(dtype).eps,
                atol=torch.finfo(dtype).tiny,
            )
            assert torch.equal(layer.lora_A[:rank], original.lora_A[:rank])
            assert layer.lora_A.dtype == dtype
            assert (layer.scaling, layer.rank) == (1.0, 3)


def test_another_adapter_than_the_active_one(tmp_path):
    model = lora()
    rw.add_adapter(model, "other", rw.AdaLoRAConfig(total_steps=5, target_modules=["value"]))
    rw.activate_adapter(model, "other")
    randomise(model)
    wanted = output(model)
    rw.activate_adapter(model, "default")
    rw.export_lora(model, tmp_path, name="other")
    again = bert()
    rw.load_adapter(again, tmp_path)
    torch.testing.assert_close(output(again.eval()), wanted, rtol=0, atol=1e-6)


def test_exporting_leaves_the_model_alone(tmp_path):
    model = adalora(ranks=(3, 0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rw.export_lora(model, tmp_path)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [layer.rank for layer in layers_of(model).values()] == [3, 0]


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="export_lora: every layer has rank 0; there is nothing"):
        rw.export_lora(adalora(ranks=(0, 0)), tmp_path / "new")
    with pytest.raises(ValueError, match=r"export_lora: adapters are \['default'\], got 'other'"):
        rw.export_lora(lora(), tmp_path / "new", name="other")
    with pytest.raises(ValueError, match="the model has no adapters"):
        rw.export_lora(bert(), tmp_path / "new")
    model = adalora(lambda: bert().half(), adapter_dtype=torch.float16)
    with torch.no_grad():
        layers_of(model)["encoder.layer.1.attention.self.value"].lora_E.fill_(6e4)
        layers_of(model)["encoder.layer.1.attention.self.value"].lora_B.fill_(2.0)
    with pytest.raises(ValueError, match='layer.1.*value" would not be finite in Half'):
        rw.export_lora(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
