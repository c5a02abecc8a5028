# Copies, pickles, dtype and device moves: merged or not, with one adapter or several.
import copy
import io
import pickle

import pytest
import torch
from layer_cases import KINDS, exact_weight, example, factors, make, nearest, randomise
from tolerances import assert_same_bits
from torch import nn

import rankwise as rw

STATES = ["plain", "merged", "several", "several merged", "disabled", "inactive"]


def in_state(kind: str, state: str, dtype=torch.float32, **options) -> nn.Module:
    layer = make(kind, dtype, **options)
    if "several" in state:
        for seed, name in enumerate(("a", "ab"), start=5):
            layer.add_adapter(name, layer.options)
            layer.activate_adapter(name)
            randomise(layer, seed)
    if "merged" in state:
        layer.merge()
    if state == "disabled":
        layer.adapters_enabled = False
    if state == "inactive":
        layer.activate_adapter(None)
    return layer.eval()


def unmerged(layer: nn.Module) -> nn.Module:
    if layer.merged:
        layer.unmerge()
    return layer


def assert_equal_layers(layer: nn.Module, twin: nn.Module) -> None:
    """Same settings and bits now, after unmerging, and for every adapter."""
    assert type(twin) is type(layer)
    for name in ("rank", "capacity", "scaling", "merged", "adapter", "adapter_names", "options"):
        assert getattr(twin, name) == getattr(layer, name), name
    x = example(layer)
    assert_same_bits(twin(x), layer(x), "output")
    unmerged(layer), unmerged(twin)
    names, others = layer.adapter_names, twin.adapter_names
    assert names == others
    for name in [*names, None]:
        layer.activate_adapter(name), twin.activate_adapter(name)
        assert_same_bits(twin(x), layer(x), f"output of {name}")
    assert list(layer.state_dict()) == list(twin.state_dict())
    for key, value in layer.state_dict().items():
        assert_same_bits(twin.state_dict()[key], value, key)
    assert [p.requires_grad for p in layer.parameters()] == [
        p.requires_grad for p in twin.parameters()
    ]


def assert_nothing_shared(layer: nn.Module, twin: nn.Module) -> None:
    unmerged(layer), unmerged(twin)
    mine = {p.data_ptr() for p in layer.parameters() if p.numel()}
    assert mine.isdisjoint(p.data_ptr() for p in twin.parameters())
    with torch.no_grad():
        before = {k: v.clone() for k, v in layer.state_dict().items()}
        for parameter in twin.parameters():
            parameter.add_(1)
    for key, value in layer.state_dict().items():
        assert_same_bits(value, before[key], key)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state", STATES)
def test_deepcopy(kind, state):
    layer = in_state(kind, state)
    twin = copy.deepcopy(layer)
    assert_equal_layers(layer, twin)
    assert_nothing_shared(layer, twin)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state", STATES)
def test_pickle_and_torch_save_of_the_module(kind, state):
    layer = in_state(kind, state, capacity=6)
    assert_equal_layers(layer, pickle.loads(pickle.dumps(layer)))
    layer, file = in_state(kind, state), io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert_equal_layers(layer, torch.load(file, weights_only=False))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state", STATES)
def test_state_dict_through_torch_save_and_weights_only_load(kind, state):
    layer, file = in_state(kind, state), io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    twin = in_state(kind, state.removesuffix("merged").strip() or "plain")
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.load_state_dict(loaded, strict=True)
    for key, value in layer.state_dict().items():
        assert_same_bits(twin.state_dict()[key], value, key)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(
    "start, move, dtype",
    [
        (torch.float32, lambda m: m.double(), torch.float64),
        (torch.float32, lambda m: m.half(), torch.float16),
        (torch.float32, lambda m: m.bfloat16(), torch.bfloat16),
        (torch.bfloat16, lambda m: m.to(torch.float32), torch.float32),
        (torch.float64, lambda m: m.float(), torch.float32),
    ],
)
def test_a_change_of_dtype_reaches_base_and_every_adapter(kind, state, start, move, dtype):
    layer = in_state(kind, state, start)
    reference = copy.deepcopy(layer)
    move(layer)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert layer(example(layer)).dtype == dtype
    unmerged(layer), unmerged(reference)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    for key, value in reference.state_dict().items():
        assert_same_bits(layer.state_dict()[key], value.to(dtype), key)
    if layer.adapter is not None:
        layer.merge()
        unmerged(layer)
    assert_same_bits(layer.state_dict()["weight"], reference.state_dict()["weight"].to(dtype), "w")


@pytest.mark.parametrize("kind", KINDS)
def test_merging_after_a_change_of_dtype_rounds_once(kind):
    layer = make(kind).half()
    exact = exact_weight(layer, layer.weight)
    layer.merge()
    assert_same_bits(layer.weight, nearest(exact, torch.float16), "merged weight")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state", STATES)
def test_to_meta_and_back_by_to_empty(kind, state):
    layer = in_state(kind, state)
    saved = copy.deepcopy(layer)
    layer.to("meta")
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    layer.to_empty(device="cpu")
    unmerged(layer), unmerged(saved)
    assert {p.device.type for p in layer.parameters()} == {"cpu"}
    layer.load_state_dict(saved.state_dict(), strict=True)
    assert_equal_layers(saved, layer)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_on_meta_gives_the_shape(kind):
    layer = make(kind).to("meta")
    x = example(layer).to("meta")
    assert (
        layer(x).shape
        == make(kind)(example(layer).to("meta").new_zeros(x.shape, device="cpu")).shape
    )


@pytest.mark.parametrize("kind", KINDS)
def test_float32_factors_stay_float32_through_a_move_without_dtype(kind):
    layer = make(kind, torch.bfloat16, adapter_dtype=torch.float32)
    layer.to("cpu").cpu()
    assert layer.weight.dtype == torch.bfloat16
    assert {f.dtype for f in factors(layer).values()} == {torch.float32}


def test_a_moved_merged_layer_keeps_a_shared_parameter_shared():
    head = nn.Linear(6, 10)
    table = nn.Embedding(10, 6)
    table.weight = head.weight
    model = nn.ModuleList([table, randomise(rw.nn.LoRALinear.from_linear(head, rank=3))])
    model[1].merge()
    model.double()
    model[1].unmerge()
    assert model[1].weight is table.weight
    assert table.weight.dtype == torch.float64


def test_deepcopy_of_a_model_keeps_ties_with_a_merged_base():
    head = nn.Linear(6, 10)
    table = nn.Embedding(10, 6)
    table.weight = head.weight
    model = nn.ModuleList([table, randomise(rw.nn.LoRALinear.from_linear(head, rank=3))])
    model[1].merge()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin[1].unmerge()
        assert twin[1].weight is twin[0].weight
        assert twin[1].weight is not model[0].weight


@pytest.mark.parametrize("kind", KINDS)
def test_optimizers_keep_their_parameters_through_moves_merges_and_switches(kind):
    layer = make(kind)
    layer.add_adapter("other", layer.options)
    before = factors(layer)
    layer.merge()
    layer.double()
    layer.unmerge()
    layer.activate_adapter("other")
    layer.activate_adapter("default")
    assert all(factors(layer)[name] is parameter for name, parameter in before.items())


def test_gradients_follow_a_change_of_dtype():
    layer = make("linear")
    layer(example(layer)).sum().backward()
    layer.double()
    assert {f.grad.dtype for f in factors(layer).values()} == {torch.float64}
