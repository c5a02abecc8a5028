# from_linear and from_embedding: the same parameters, hooks and flags as the layer that was there.
import pytest
import torch
from layer_cases import IN, OUT, example, randomise
from tolerances import assert_same_bits
from torch import nn
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

import rankwise as rw

BASES = {
    "linear": (lambda: nn.Linear(IN, OUT), rw.nn.LoRALinear.from_linear),
    "adalora": (lambda: nn.Linear(IN, OUT), rw.nn.AdaLoRALinear.from_linear),
    "conv1d": (lambda: Conv1D(OUT, IN), rw.nn.LoRALinear.from_linear),
    "embedding": (lambda: nn.Embedding(9, 4, padding_idx=2), rw.nn.LoRAEmbedding.from_embedding),
}


@pytest.fixture(params=BASES)
def pair(request):
    """A base layer and the adapted layer around it."""
    build, adapt = BASES[request.param]
    base = build()
    return base, adapt(base, rank=3)


def test_parameters_are_the_same_objects_and_frozen(pair):
    base, layer = pair
    assert layer.weight is base.weight
    assert getattr(layer, "bias", None) is getattr(base, "bias", None)
    assert not any(p.requires_grad for p in base.parameters())
    assert layer.lora_A.requires_grad and layer.lora_B.requires_grad


def test_the_base_itself_still_computes_the_base(pair):
    base, layer = pair
    x = example(layer)
    before = base(x)
    randomise(layer)
    assert not any("lora" in name for name in base.state_dict())
    assert_same_bits(base(x), before, "the base's own output")
    assert not torch.equal(layer(x), before)


def test_output_is_the_bases_at_the_start(pair):
    base, layer = pair
    x = example(layer)
    torch.testing.assert_close(layer(x), base(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("training", [True, False])
def test_the_training_flag_is_taken_over_everywhere(kind, training):
    build, adapt = BASES[kind]
    layer = adapt(build().train(training), rank=3)
    layer.add_adapter("other", layer.options)
    assert {module.training for module in layer.modules()} == {training}


def test_conv1d_keeps_its_layout_and_storage():
    base = Conv1D(OUT, IN)
    layer = rw.nn.LoRALinear.from_linear(base, rank=3)
    assert (layer.in_features, layer.out_features) == (IN, OUT)
    assert layer.weight.shape == (IN, OUT)
    assert layer.weight.data_ptr() == base.weight.data_ptr()
    assert layer.lora_A.shape == (3, IN) and layer.lora_B.shape == (OUT, 3)
    assert_same_bits(layer.state_dict()["weight"], base.weight, "weight in the state dict")
    randomise(layer)
    layer.merge()
    assert layer.weight.shape == (IN, OUT) and layer.weight.is_contiguous()


def test_a_state_of_conv1d_loads_strictly():
    layer, other = rw.nn.LoRALinear.from_linear(Conv1D(OUT, IN), rank=3), Conv1D(OUT, IN)
    layer.load_state_dict(other.state_dict(), strict=True)
    assert_same_bits(layer.weight, other.weight, "weight")


def test_hooks_go_along_and_fire_once():
    base, calls = nn.Linear(IN, OUT), []
    base.register_forward_pre_hook(lambda *_: calls.append("pre"))
    base.register_forward_hook(lambda *_: calls.append("post"))
    base.register_forward_pre_hook(lambda m, a, k: calls.append("kwargs"), with_kwargs=True)
    base.register_full_backward_hook(lambda *_: calls.append("backward"))
    layer = rw.nn.LoRALinear.from_linear(base, rank=3)
    layer(torch.randn(2, IN, requires_grad=True)).sum().backward()
    assert sorted(calls) == ["backward", "kwargs", "post", "pre"]


def test_a_hook_registered_before_can_be_removed_after():
    base, calls = nn.Linear(IN, OUT), []
    handle = base.register_forward_hook(lambda *_: calls.append("post"))
    layer = rw.nn.LoRALinear.from_linear(base, rank=3)
    handle.remove()
    layer(torch.randn(2, IN))
    assert calls == []


def test_attributes_of_the_user_go_along():
    base = nn.Linear(IN, OUT)
    base.label = "query of layer 3"
    assert rw.nn.LoRALinear.from_linear(base).label == "query of layer 3"


def test_the_same_options_as_the_constructor():
    options = dict(
        rank=2,
        alpha=5.0,
        dropout=0.5,
        rslora=True,
        init="gaussian",
        capacity=4,
        adapter_dtype=torch.float32,
    )
    built = rw.nn.LoRALinear(IN, OUT, dtype=torch.bfloat16, **options)
    around = rw.nn.LoRALinear.from_linear(nn.Linear(IN, OUT, dtype=torch.bfloat16), **options)
    for name in ("rank", "capacity", "alpha", "scaling", "dropout", "options"):
        assert getattr(around, name) == getattr(built, name)
    assert around.lora_A.dtype == built.lora_A.dtype == torch.float32


def test_an_unknown_option_is_named():
    with pytest.raises(TypeError, match="ranks"):
        rw.nn.LoRALinear.from_linear(nn.Linear(IN, OUT), ranks=3)


def test_an_embedding_has_no_dropout_to_ask_for():
    with pytest.raises((TypeError, ValueError), match="dropout"):
        rw.nn.LoRAEmbedding.from_embedding(nn.Embedding(9, 4), dropout=0.5)


class Quantised(nn.Linear):
    """Stands for the layers of quantisation libraries: a subclass that computes another thing."""


@pytest.mark.parametrize(
    "wrong, name",
    [
        (Quantised(IN, OUT), "Quantised"),
        (nn.Embedding(9, 4), "Embedding"),
        (nn.Conv1d(IN, OUT, 1), "Conv1d"),
        (nn.MultiheadAttention(4, 2).out_proj, "NonDynamicallyQuantizableLinear"),
        (rw.nn.LoRALinear(IN, OUT), "LoRALinear"),
    ],
)
def test_from_linear_refuses_other_layers_by_name(wrong, name):
    before = [p.requires_grad for p in wrong.parameters()]
    with pytest.raises(TypeError, match=rf"from_linear: linear must be .*, got {name}$"):
        rw.nn.LoRALinear.from_linear(wrong)
    assert [p.requires_grad for p in wrong.parameters()] == before


def test_from_embedding_refuses_other_layers_and_options_it_cannot_keep():
    adapt = rw.nn.LoRAEmbedding.from_embedding
    with pytest.raises(TypeError, match="embedding must be an nn.Embedding, got Linear"):
        adapt(nn.Linear(IN, OUT))
    for option in ({"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}):
        base = nn.Embedding(9, 4, **option)
        with pytest.raises(ValueError, match=f"an embedding with {next(iter(option))}"):
            adapt(base)
        assert base.weight.requires_grad


def test_a_forward_replaced_on_the_instance_is_refused():
    base = nn.Linear(IN, OUT)
    base.forward = lambda x: x
    with pytest.raises(TypeError, match="LoRALinear: the Linear's forward was replaced"):
        rw.nn.LoRALinear.from_linear(base)
    assert base.weight.requires_grad


def test_bad_options_leave_the_base_trainable():
    base = nn.Linear(IN, OUT)
    wrong_dtype = {"dtype": torch.float16}, {"adapter_dtype": torch.float16}
    for options in ({"rank": -1}, {"init": "magic"}, {"capacity": 1}, *wrong_dtype):
        with pytest.raises((ValueError, TypeError)):
            rw.nn.LoRALinear.from_linear(base, **options)
        assert base.weight.requires_grad and base.bias.requires_grad


def test_weight_that_is_computed_by_a_hook_is_refused():
    base = nn.Linear(IN, OUT)
    prune.identity(base, "weight")  # weight is now weight_orig * weight_mask
    with pytest.raises((TypeError, ValueError), match="weight"):
        rw.nn.LoRALinear.from_linear(base, rank=3)


def test_parametrised_weight_is_refused():
    base = nn.utils.parametrizations.weight_norm(nn.Linear(IN, OUT))
    with pytest.raises(TypeError, match="ParametrizedLinear"):
        rw.nn.LoRALinear.from_linear(base)
