# torch.compile over adapted models: no graph break, eager's values, switches noticed (no codegen).
import copy

import torch
from small_models import randomise
from torch import nn

import rankwise as rw
from rankwise.config import LoRAConfig


def two_layers() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    config = LoRAConfig(rank=2, target_modules="all-linear")
    return randomise(rw.apply_lora(model, config))


def values(function, model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    y = function(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_compiled_values_and_gradients_are_eagers():
    model = two_layers()
    x = torch.randn(5, 8, dtype=torch.float64)
    wanted = values(model, model, x)
    found = values(torch.compile(model, fullgraph=True, backend="aot_eager"), model, x)
    assert len(found) == len(wanted) == 5
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_compiled_model_notices_merge_disable_and_switch():
    """Guards, not stale graphs: what eager computes now is what the compiled model computes."""
    model = two_layers().eval()
    rw.add_adapter(model, "b", LoRAConfig(rank=3, alpha=3.0, target_modules=["2"]))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 8, dtype=torch.float64)

    def check():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-12, atol=1e-12)
        return compiled(x).detach()

    first = check()
    with rw.disable_adapters(model):
        assert not torch.allclose(check(), first)
    torch.testing.assert_close(check(), first, rtol=0, atol=0)
    rw.merge(model)
    torch.testing.assert_close(check(), first, rtol=1e-12, atol=1e-12)
    rw.unmerge(model)
    rw.activate_adapter(model, "b")
    randomise(model, seed=7)
    assert not torch.allclose(check(), first)
    rw.activate_adapter(model, "default")
    torch.testing.assert_close(check(), first, rtol=0, atol=0)


def test_an_embedding_and_a_transposed_layer_compile():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = rw.nn.LoRAEmbedding(9, 8, rank=2, dtype=torch.float64)
            self.gate = rw.nn.AdaLoRALinear(8, 4, rank=2, dtype=torch.float64)

        def forward(self, i):
            return self.gate(self.table(i))

    model = Small()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    indices = torch.tensor([[0, 3, 8]])
    wanted = values(copy.deepcopy(model), model, indices)[0]
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(indices)
    torch.testing.assert_close(found.detach(), wanted, rtol=1e-12, atol=1e-12)
