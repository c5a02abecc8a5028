# nn.TransformerEncoderLayer and nn.MultiheadAttention, whose fast paths read weights past forward.
import copy

import pytest
import torch
from small_models import adapted, deltas, randomise
from torch import nn

import rankwise as rw
from rankwise.config import LoRAConfig

CONFIG = LoRAConfig(rank=2, target_modules=["linear1", "linear2"])


def layer(**options) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(
        16, 2, 24, dropout=0.0, batch_first=True, dtype=torch.float64, **options
    )


def merged_plain(model: nn.Module, plain: nn.Module) -> nn.Module:
    plain = copy.deepcopy(plain)
    with torch.no_grad():
        for name, delta in deltas(model).items():
            plain.get_submodule(name).weight.add_(delta)
    return plain


def padding() -> torch.Tensor:
    return torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


@pytest.mark.parametrize("options", [{}, {"activation": "gelu"}, {"norm_first": True}])
@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_inference_computes_what_training_computes(options, grad):
    plain = layer(**options)
    model = randomise(rw.apply_lora(copy.deepcopy(plain), CONFIG))
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    trained = model.train()(x).detach()
    wanted = merged_plain(model, plain).train()(x).detach()
    with grad():
        inferred = model.eval()(x)
    torch.testing.assert_close(trained, wanted, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(inferred.detach().clone(), wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_a_stack_with_padding_in_inference(mask, nested):
    plain = nn.TransformerEncoder(layer(), 2, enable_nested_tensor=nested)
    model = randomise(rw.apply_lora(copy.deepcopy(plain), CONFIG))
    assert len(adapted(model)) == 4
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    key_mask = padding() if mask else None
    wanted = merged_plain(model, plain).train()(x, src_key_padding_mask=key_mask).detach()
    with torch.no_grad():
        inferred = model.eval()(x, src_key_padding_mask=key_mask)
    kept = ~padding() if mask else torch.ones(2, 5, dtype=torch.bool)
    torch.testing.assert_close(inferred[kept], wanted[kept], rtol=1e-10, atol=1e-11)


def test_merged_inference_and_the_base_after_it():
    plain = layer().eval()
    model = randomise(rw.apply_lora(copy.deepcopy(plain), CONFIG)).eval()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    with torch.no_grad():
        wanted = model(x)
        rw.merge(model)
        torch.testing.assert_close(model(x), wanted, rtol=1e-10, atol=1e-11)
        with rw.disable_adapters(model):
            torch.testing.assert_close(model(x), plain(x), rtol=1e-10, atol=1e-11)
        rw.unmerge(model)
        torch.testing.assert_close(model(x), wanted, rtol=1e-10, atol=1e-11)


def test_layers_put_in_by_hand_are_not_passed_over():
    plain = layer()
    model = copy.deepcopy(plain).requires_grad_(False)
    model.linear1 = rw.nn.LoRALinear.from_linear(model.linear1, rank=2)
    model.linear2 = rw.nn.LoRALinear.from_linear(model.linear2, rank=2)
    randomise(model)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    wanted = merged_plain(model, plain).train()(x).detach()
    with torch.no_grad():
        inferred = model.eval()(x)
    torch.testing.assert_close(inferred, wanted, rtol=1e-10, atol=1e-11)


def test_the_whole_nn_transformer():
    plain = nn.Transformer(
        16, 2, 1, 1, 24, dropout=0.0, batch_first=True, dtype=torch.float64
    )  # fmt: skip
    model = randomise(rw.apply_lora(copy.deepcopy(plain), CONFIG)).eval()
    assert len(adapted(model)) == 4
    source, target = torch.randn(2, 2, 5, 16, dtype=torch.float64).unbind()
    wanted = merged_plain(model, plain).train()(source, target).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(source, target), wanted, rtol=1e-10, atol=1e-11)


def test_all_linear_leaves_the_attentions_projection_alone():
    model = rw.apply_lora(layer(), LoRAConfig(rank=2, target_modules="all-linear"))
    assert set(adapted(model)) == {"linear1", "linear2"}


def test_attentions_projection_is_refused_by_name():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2), "out": nn.Linear(16, 2)})
    with pytest.raises(ValueError, match="'attention.out_proj' is a NonDynamicallyQuantizable"):
        rw.apply_lora(model, LoRAConfig(target_modules=["out_proj", "out"]))
