# The model of test_model_machine.py, what adapts and trains it, and its dense float64 weights.
from __future__ import annotations

import torch
from torch import nn

import rankwise as rw
from rankwise.model_adapters import ModelAdapters

TOKENS = torch.arange(7).repeat(3).reshape(3, 7)
WHOLE = ["head"]
STEPS = 6
CONFIGS = {
    "lora": rw.LoRAConfig(rank=2, target_modules=["first", "second"]),
    "rslora": rw.LoRAConfig(rank=3, rslora=True, target_modules=["second"], modules_to_save=WHOLE),
    "table": rw.LoRAConfig(rank=2, rank_pattern={"first": 1}, target_modules=["table", "first"]),
    "adalora": rw.AdaLoRAConfig(
        initial_rank=3, target_rank=1, total_steps=STEPS, target_modules=["first", "second"],
        modules_to_save=WHOLE,
    ),
    "spectral": rw.SpectralConfig(
        initial_rank=2, max_rank=4, total_steps=STEPS, allocation_interval=2, min_rank=1,
        hysteresis=0.0, target_modules=["first", "second"],
    ),
}  # fmt: skip
ALLOCATORS = {"adalora": rw.RankAllocator, "spectral": rw.SpectralAllocator}
OPTIMIZERS = {"AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 6)
        self.head = nn.Linear(6, 3)
        self.double()

    def forward(self, tokens):
        return self.head(self.second(torch.tanh(self.first(self.table(tokens)))).mean(1))


def weights_of(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """What an adapter makes of the base's tensors, dense, from its parts."""
    state = ModelAdapters.of(model)
    found = {}
    for path, layer in state.layers.items():
        if name in layer.adapter_names:
            held = layer.held_adapter(name)
            A = held.lora_A if held.lora_E is None else held.lora_E * held.lora_A
            update = held.lora_B[:, : held.rank] @ A[: held.rank]
            if held.lora_first is not None:
                update = update + held.lora_first.lora_B @ held.lora_first.lora_A
            update = held.options.scaling * (update.t() if layer.transposed else update)
            weight = layer._base_weight()
            found[f"{path}.weight"] = (weight + update).detach().clone()
    for path, module in state.whole[name].items():
        found |= {f"{path}.{key}": p.detach().clone() for key, p in module.named_parameters()}
    return found


def assert_model(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        expected = torch.func.functional_call(Net(), weights, (TOKENS,))
        torch.testing.assert_close(model(TOKENS), expected, rtol=0, atol=1e-10)
