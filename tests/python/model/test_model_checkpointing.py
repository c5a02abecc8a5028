# Activation checkpointing: the same gradients as without, also with dropout, also reentrant.
import copy

import pytest
import torch
from small_models import bert, gpt2, llama, loss, randomise
from tolerances import assert_same_bits
from torch import nn
from torch.utils.checkpoint import checkpoint

import rankwise as rw
from rankwise.config import LoRAConfig

TARGETS = {bert: ["query", "value", "dense"], llama: "all-linear", gpt2: ["c_attn", "c_fc"]}


def gradients(model: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    loss(model).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual, expected):
    assert actual.keys() == expected.keys() and actual
    for name, value in expected.items():
        assert_same_bits(actual[name], value, name)


@pytest.mark.parametrize("build", TARGETS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("reentrant", [False, True])
def test_transformers_gradient_checkpointing(build, dropout, reentrant):
    config = LoRAConfig(rank=2, dropout=dropout, target_modules=TARGETS[build])
    model = randomise(rw.apply_lora(build(), config)).train()
    if reentrant:
        model.enable_input_require_grads()
    wanted = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same_gradients(gradients(model), wanted)
    if dropout:
        different = gradients(model, seed=1)
        assert any(not torch.equal(different[name], value) for name, value in wanted.items())


class Blocks(nn.Module):
    def __init__(self, reentrant: bool | None):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(3)
        )
        self.reentrant = reentrant

    def forward(self, x):
        for block in self.blocks:
            if self.reentrant is None:
                x = x + block(x)
            else:
                x = x + checkpoint(block, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_checkpoint_with_dropout(reentrant, dtype):
    config = LoRAConfig(rank=2, dropout=0.3, target_modules="all-linear")
    model = randomise(rw.apply_lora(Blocks(None).to(dtype), config)).train()
    x = torch.randn(5, 8, dtype=dtype, requires_grad=True)
    results = []
    for mode in (None, reentrant):
        model.reentrant = mode
        model.zero_grad()
        x.grad = None
        torch.manual_seed(3)
        model(x).square().sum().backward()
        results.append(
            {"x": x.grad.clone()}
            | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
    assert len(results[0]) == 13
    assert_same_gradients(results[1], results[0])


def test_every_adapter_is_healthy_under_checkpointing():
    model = rw.apply_lora(bert(), LoRAConfig(rank=2, target_modules=["query", "value"]))
    model.gradient_checkpointing_enable()
    gradients(model.train())
    assert rw.health_check(model).ok


def test_switching_between_steps():
    model = rw.apply_lora(bert(), LoRAConfig(rank=2, target_modules=["query"]), "a").train()
    rw.add_adapter(model, "b", LoRAConfig(rank=3, target_modules=["query"]))
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable()
    for name in ("b", "a", "b"):
        for each in (model, twin):
            rw.activate_adapter(each, name)
            randomise(each)
        assert_same_gradients(gradients(twin), gradients(model))
