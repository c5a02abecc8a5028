"""Small models for the tests of adapter folders, built the same way each time."""

import re

import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import rankwise as rw

IDS = torch.arange(14).reshape(2, 7)


def bert() -> torch.nn.Module:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(intermediate_size=64, vocab_size=100, **sizes)
    return BertModel(config, add_pooling_layer=False).eval()


def gpt2() -> torch.nn.Module:
    torch.manual_seed(1)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 50}
    return GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **sizes)).eval()


def output(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS)[0]


def randomise(model: torch.nn.Module, std: float = 0.1) -> None:
    """Trained-like values: B or E is zero at the start, which would hide a lost adapter."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=std)


def prune(layer: torch.nn.Module, rank: int) -> None:
    """What allocation leaves behind: the kept directions in front, the others zero."""
    layer.rank = rank
    with torch.no_grad():
        for factor in (layer.lora_A, layer.lora_B.t(), layer.lora_E):
            factor[rank:] = 0


def layers_of(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The adapted layers by name."""
    return {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}


def refuses(model: torch.nn.Module, folder, *patterns: str) -> None:
    """load_adapter fails with a message that fits all patterns, and the model is as before."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = dict(model.named_modules())
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    ranks = {name: layer.rank for name, layer in layers_of(model).items()}
    with pytest.raises(rw.FileError) as error:
        rw.load_adapter(model, folder)
    for pattern in patterns:
        assert re.search(pattern, str(error.value)), f"{pattern!r} is not in {error.value}"
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert dict(model.named_modules()) == modules
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    assert {name: layer.rank for name, layer in layers_of(model).items()} == ranks


def loads_in_place(model: torch.nn.Module, folder) -> None:
    """What was saved comes back into the same, emptied, parameters."""
    wanted = output(model)
    rw.save_adapter(model, folder)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.zero_()
    rw.load_adapter(model, folder)
    assert torch.equal(output(model), wanted)
    assert all(dict(model.named_parameters())[n] is p for n, p in parameters.items())
