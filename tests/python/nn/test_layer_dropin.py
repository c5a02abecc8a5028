# LoRALinear, AdaLoRALinear, LoRAEmbedding in the place of nn.Linear, nn.Embedding: arguments, keys.
import inspect

import numpy as np
import pytest
import torch
from layer_cases import IN, KINDS, OUT, computed, exact_weight, example, factors, linear, make
from tolerances import assert_close, assert_same_bits
from torch import nn
from torch.nn import functional as F

import rankwise as rw

LINEARS = [rw.nn.LoRALinear, rw.nn.AdaLoRALinear]


@pytest.mark.parametrize("kind", LINEARS)
def test_constructor_takes_the_arguments_of_nn_linear_in_its_order(kind):
    ours = list(inspect.signature(kind).parameters.values())
    theirs = list(inspect.signature(nn.Linear).parameters.values())
    for mine, reference in zip(ours, theirs, strict=False):
        assert (mine.name, mine.default) == (reference.name, reference.default)
        assert mine.kind == reference.kind
    assert all(p.kind == p.KEYWORD_ONLY for p in ours[len(theirs) :])


@pytest.mark.parametrize("kind", LINEARS)
def test_positional_device_and_dtype(kind):
    layer = kind(5, 3, False, "cpu", torch.float64)
    assert layer.bias is None
    assert layer.weight.dtype == layer.lora_A.dtype == layer.lora_B.dtype == torch.float64
    assert (layer.in_features, layer.out_features) == (5, 3)
    assert kind(5, 3, True, torch.device("meta")).lora_A.device.type == "meta"


def test_the_embedding_takes_padding_idx_positionally_and_clears_its_row():
    layer = rw.nn.LoRAEmbedding(9, 4, -2, dtype=torch.float64)
    assert layer.padding_idx == 7
    assert layer.weight.dtype == torch.float64
    assert not layer.weight[7].any() and layer.weight[6].any()


@pytest.mark.parametrize("kind", KINDS)
def test_is_the_layer_it_stands_for(kind):
    layer = make(kind)
    assert isinstance(layer, nn.Embedding if kind == "embedding" else nn.Linear)
    bias = [] if kind == "embedding" else ["bias"]
    gate = ["lora_E"] if kind == "adalora" else []
    names = ["weight", *bias, "lora_A", "lora_B", *gate]
    assert list(layer.state_dict()) == names
    assert [n for n, _ in layer.named_parameters()] == names
    trained = [n for n, p in layer.named_parameters() if p.requires_grad]
    assert trained == ["lora_A", "lora_B", *gate]


def test_without_bias_there_is_no_such_key():
    layer = rw.nn.LoRALinear(4, 3, bias=False)
    assert list(layer.state_dict()) == ["weight", "lora_A", "lora_B"]


@pytest.mark.parametrize("kind", LINEARS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_seed_gives_nn_linears_weight_and_bias(kind, dtype):
    torch.manual_seed(7)
    plain = nn.Linear(33, 17, dtype=dtype)
    torch.manual_seed(7)
    layer = kind(33, 17, dtype=dtype)
    assert_same_bits(layer.weight, plain.weight, "weight")
    assert_same_bits(layer.bias, plain.bias, "bias")


def test_the_same_seed_gives_nn_embeddings_weight():
    torch.manual_seed(7)
    plain = nn.Embedding(21, 5, padding_idx=3)
    torch.manual_seed(7)
    assert_same_bits(rw.nn.LoRAEmbedding(21, 5, 3).weight, plain.weight, "weight")


@pytest.mark.parametrize("kind", LINEARS)
def test_a_plain_linears_state_loads_strictly_and_leaves_the_adapter(kind):
    plain, layer = nn.Linear(IN, OUT), kind(IN, OUT)
    before = {name: f.detach().clone() for name, f in factors(layer).items()}
    keys = layer.load_state_dict(plain.state_dict(), strict=True)
    assert (keys.missing_keys, keys.unexpected_keys) == ([], [])
    assert_same_bits(layer.weight, plain.weight, "weight")
    assert_same_bits(layer.bias, plain.bias, "bias")
    for name, value in before.items():
        assert_same_bits(getattr(layer, name), value, name)


def test_a_plain_models_state_loads_strictly_into_the_adapted_model():
    plain = nn.Sequential(nn.Embedding(9, 4), nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)))
    model = nn.Sequential(
        rw.nn.LoRAEmbedding(9, 4),
        nn.Sequential(rw.nn.LoRALinear(4, 6), rw.nn.AdaLoRALinear(6, 2)),
    )
    model.load_state_dict(plain.state_dict(), strict=True)
    indices = torch.tensor([[0, 8, 3]])
    torch.testing.assert_close(model(indices), plain(indices))


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_state_loads_strictly_when_other_adapters_wait(kind):
    layer = make(kind)
    layer.add_adapter("other", layer.options)
    plain = {k: torch.randn_like(v) for k, v in layer.state_dict().items() if "lora" not in k}
    layer.load_state_dict(plain, strict=True)
    assert_same_bits(layer.weight, plain["weight"], "weight")


@pytest.mark.parametrize("lost", ["lora_A", "adapters.other.lora_B"])
def test_an_adapters_state_without_all_adapters_is_reported_missing(lost):
    layer = make("linear")
    layer.add_adapter("other", layer.options)
    state = {name: value for name, value in layer.state_dict().items() if name != lost}
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{lost}"'):
        layer.load_state_dict(state)


@pytest.mark.parametrize("kind", KINDS)
def test_its_own_state_loads_into_a_fresh_layer(kind):
    layer, fresh = make(kind), KINDS[kind](torch.float32, rank=4, alpha=8.0)
    fresh.load_state_dict(layer.state_dict(), strict=True)
    for name, value in layer.state_dict().items():
        assert_same_bits(fresh.state_dict()[name], value, name)
    x = example(layer)
    assert_same_bits(fresh(x), layer(x), "output")


@pytest.mark.parametrize("lost", ["lora_A", "lora_B", "lora_E", "weight", "bias"])
def test_a_part_of_the_keys_is_reported_missing(lost):
    layer = make("adalora")
    state = {name: value for name, value in layer.state_dict().items() if name != lost}
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{lost}"'):
        layer.load_state_dict(state)


def test_missing_base_keys_are_reported_without_adapter_keys_too():
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "bias"\. *$'):
        linear(torch.float32).load_state_dict({"weight": torch.zeros(OUT, IN)})


def test_unknown_keys_and_other_ranks_are_errors():
    layer = linear(torch.float32, rank=4)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "lora_C"'):
        layer.load_state_dict({**layer.state_dict(), "lora_C": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="size mismatch for lora_A"):
        layer.load_state_dict(linear(torch.float32, rank=5).state_dict())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_output_against_float64(kind, training):
    layer = make(kind).train(training)
    x = example(layer)
    expected, size = computed(layer, exact_weight(layer, layer.weight), x)
    assert_close(layer(x), expected, size, kind)


@pytest.mark.parametrize("shape", [(IN,), (0, IN), (1, IN), (2, 0, IN), (2, 1, 3, IN)])
def test_leading_dimensions_are_those_of_nn_linear(shape):
    layer = make("linear", torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    reference = F.linear(x, exact_weight(layer, layer.weight), layer.bias)
    assert layer(x).shape == reference.shape
    assert_close(layer(x), reference.detach().numpy(), np.full(reference.shape, 50.0), "y")


def test_gradients_reach_the_factors_and_the_input_only():
    layer = make("adalora", torch.float64)
    x = example(layer).requires_grad_()
    layer(x).square().sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None
    gradients = {name: f.grad for name, f in factors(layer).items()}
    assert all(g is not None and g.abs().sum() > 0 for g in [x.grad, *gradients.values()])


def test_functional_call_uses_the_tensors_it_is_given():
    layer = make("linear", torch.float64)
    x = example(layer)
    other = make("linear", torch.float64)
    given = {n: p.detach() for n, p in other.named_parameters()}
    called = torch.func.functional_call(layer, given, (x,))
    assert_same_bits(called, other(x), "output")


def test_repr_says_what_the_adapter_is():
    text = repr(rw.nn.LoRALinear(4, 3, rank=2, alpha=6, dropout=0.25))
    for part in ("LoRALinear", "in_features=4", "out_features=3", "rank=2", "alpha=6", "0.25"):
        assert part in text
