# merge and unmerge: what is changed, what is not, what is refused, and every bit of the base back.
import pytest
import torch
from layer_cases import DTYPES, KINDS, computed, exact_weight, example, factors, make, randomise
from tolerances import assert_close, assert_same_bits
from torch import nn

import rankwise as rw

LAYERS = [(kind, *dtypes) for kind in KINDS for dtypes in DTYPES]


def id_of(case):
    return "-".join(str(part).removeprefix("torch.") for part in case)


@pytest.fixture(params=LAYERS, ids=id_of)
def layer(request):
    kind, dtype, adapter_dtype = request.param
    return make(kind, dtype, adapter_dtype=adapter_dtype).eval()


def test_merged_output_is_the_same_function(layer):
    x = example(layer)
    expected, size = computed(layer, exact_weight(layer, layer.weight), x)
    layer.merge()
    assert layer.merged
    assert_close(layer(x), expected, size, "merged output")
    layer.unmerge()
    assert not layer.merged
    assert_close(layer(x), expected, size, "unmerged output")


@pytest.mark.parametrize("cycles", [1, 10, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_cycles_restore_every_bit(kind, cycles):
    for dtype, adapter_dtype in DTYPES:
        layer = make(kind, dtype, adapter_dtype=adapter_dtype)
        base, parameter = layer.weight.detach().clone(), layer.weight
        x = example(layer)
        output = layer(x).detach().clone()
        for cycle in range(cycles):
            layer.merge()
            layer.unmerge()
            if cycle % 100 == 0:  # another update each time
                randomise(layer, seed=cycle)
        assert layer.weight is parameter
        assert_same_bits(layer.weight, base, f"{kind} {dtype} base after {cycles} cycles")
        randomise(layer)
        assert_same_bits(layer(x).detach(), output, "output")


def test_negative_zeros_nans_payload_and_subnormals_of_the_base_come_back():
    layer = make("linear", torch.float32)
    with torch.no_grad():
        layer.weight[0, :3] = torch.tensor([-0.0, 1e-45, -1e-40])
    base = layer.weight.detach().clone()
    layer.merge()
    layer.unmerge()
    assert_same_bits(layer.weight, base, "base")


def test_merged_state_is_a_plain_layers(layer):
    bias = [] if isinstance(layer, nn.Embedding) else ["bias"]
    layer.add_adapter("other", layer.options)
    layer.merge()
    state = layer.state_dict()
    assert list(state) == ["weight", *bias]
    assert_same_bits(state["weight"], layer.weight, "weight")
    if not isinstance(layer, nn.Embedding) and not layer.transposed:
        plain = nn.Linear(layer.in_features, layer.out_features, dtype=layer.weight.dtype)
        plain.load_state_dict(state, strict=True)
        x = example(layer)
        assert_same_bits(plain(x), layer(x), "a plain layer's output")
    layer.unmerge()
    assert "adapters.other.lora_A" in layer.state_dict()


def test_merged_state_of_a_model_hides_the_adapters_keys_only():
    model = nn.Sequential(make("linear"), nn.LayerNorm(10), nn.Linear(10, 2))
    model.lora_A_like = nn.Parameter(torch.ones(1))
    plain = [k for k in model.state_dict() if k not in ("0.lora_A", "0.lora_B")]
    model[0].merge()
    assert list(model.state_dict()) == plain
    assert sorted(model.state_dict(prefix="top.")) == sorted(f"top.{key}" for key in plain)


def test_a_merged_layer_keeps_adapter_and_flags(layer):
    before = {n: f.detach().clone() for n, f in factors(layer).items()}
    report = layer.merge()
    assert isinstance(report, rw.MergeReport)
    assert not layer.weight.requires_grad
    layer.unmerge()
    assert not layer.weight.requires_grad
    for name, factor in factors(layer).items():
        assert_same_bits(factor, before[name], name)
        assert factor.requires_grad


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["lora_A", "lora_B", "weight"])
def test_what_is_not_finite_is_refused_and_nothing_changes(kind, value, where):
    layer = make(kind, torch.bfloat16)
    with torch.no_grad():
        getattr(layer, where)[1, 1] = value
    parameter, before = layer.weight, {k: v.clone() for k, v in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match="merge: .* not be finite; nothing was changed"):
        layer.merge()
    assert not layer.merged and layer.weight is parameter
    for name, tensor in layer.state_dict().items():
        assert_same_bits(tensor, before[name], name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_overflow_of_the_sum_is_refused(dtype):
    """Finite in float64, infinite in the weight's dtype."""
    layer = make("linear", dtype)
    with torch.no_grad():
        layer.weight[3, 3] = torch.finfo(dtype).max
        layer.lora_B[3], layer.lora_A[:, 3] = torch.finfo(dtype).max / 8, 1.0
    with pytest.raises(RuntimeError, match="not be finite"):
        layer.merge()
    assert not layer.merged


def test_an_inactive_direction_that_is_not_finite_does_not_matter():
    layer = make("linear", rank=2, capacity=4)
    with torch.no_grad():
        layer.lora_A[3] = float("nan")
    layer.merge()
    assert layer.weight.isfinite().all()


def test_double_merge_and_double_unmerge_warn_and_do_nothing(layer):
    with pytest.warns(UserWarning, match="unmerge: the layer is not merged"):
        layer.unmerge()
    layer.merge()
    weight = layer.weight
    with pytest.warns(UserWarning, match="merge: the layer is merged already"):
        assert layer.merge() is None
    assert layer.weight is weight
    layer.unmerge()
    base = layer.weight
    with pytest.warns(UserWarning, match="unmerge: the layer is not merged"):
        layer.unmerge()
    assert layer.weight is base


@pytest.mark.parametrize("kind", KINDS)
def test_training_while_merged_raises_and_inference_does_not(kind):
    layer = make(kind).train()
    x = example(layer)
    layer.merge()
    with pytest.raises(RuntimeError, match=r"a merged layer would train nothing.*unmerge\(\)"):
        layer(x)
    with torch.no_grad():
        layer(x)
    layer.eval()(x)
    layer.unmerge()
    layer.train()(x).sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_loading_while_merged_is_refused_and_nothing_changes(kind):
    layer = make(kind)
    layer.add_adapter("other", layer.options)
    own = {name: torch.ones_like(value) for name, value in layer.state_dict().items()}
    plain = {name: value for name, value in own.items() if "lora" not in name}
    layer.merge()
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    for state in (plain, own):
        for strict in (True, False):
            with pytest.raises(RuntimeError, match="a merged layer loads no state; unmerge first"):
                layer.load_state_dict(state, strict=strict)
    for name, parameter in layer.named_parameters():
        assert_same_bits(parameter, before[name], name)
    layer.unmerge()
    layer.load_state_dict(own, strict=True)
    assert (layer.weight == 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_loads_and_switches_between_merges_leave_the_loaded_base(kind):
    layer = make(kind, torch.bfloat16)
    layer.add_adapter("other", layer.options)
    loaded = {k: torch.randn_like(v) for k, v in layer.state_dict().items()}
    layer.merge()
    layer.unmerge()
    layer.load_state_dict(loaded)
    for name in ("other", "default", None, "other"):
        layer.activate_adapter(name)
        if name is not None:
            randomise(layer)
            layer.merge()
            layer.unmerge()
    layer.delete_adapter("other")
    assert_same_bits(layer.weight, loaded["weight"], "base")


def test_a_merged_layer_refuses_to_switch_and_to_lose_its_adapter():
    layer = make("linear")
    layer.add_adapter("other", layer.options)
    layer.merge()
    weight = layer.weight
    for change in (layer.activate_adapter, layer.delete_adapter):
        with pytest.raises(RuntimeError, match=r"the layer is merged; call unmerge\(\) first"):
            change("default" if change == layer.delete_adapter else "other")
    with pytest.raises(RuntimeError, match="the layer is merged"):
        layer.activate_adapter(None)
    layer.delete_adapter("other")
    assert layer.merged and layer.weight is weight and layer.adapter_names == ["default"]


def test_without_an_active_adapter_there_is_nothing_to_merge():
    layer = make("linear")
    layer.activate_adapter(None)
    with pytest.raises(RuntimeError, match="merge: no adapter is active"):
        layer.merge()


def test_a_weight_shared_with_another_layer_is_not_touched():
    head = nn.Linear(6, 10, bias=False)
    table = nn.Embedding(10, 6)
    table.weight = head.weight
    layer = randomise(rw.nn.LoRALinear.from_linear(head, rank=3))
    before = head.weight.detach().clone()
    layer.merge()
    assert not torch.equal(layer.weight, before)
    assert table.weight is head.weight
    assert_same_bits(table.weight, before, "the tied table")
    layer.unmerge()
    assert layer.weight is table.weight
    assert_same_bits(table.weight, before, "the tied table")


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_strides_of_the_weight_are_kept(kind):
    layer = make(kind, torch.bfloat16)
    rows, cols = layer.weight.shape
    values = layer.weight.detach().clone()
    layer.weight = nn.Parameter(torch.empty(cols, rows, dtype=values.dtype).t(), False)
    with torch.no_grad():
        layer.weight.copy_(values)
    exact = exact_weight(layer, layer.weight)
    layer.merge()
    assert layer.weight.stride() == (1, rows)
    assert (layer.weight.double() - exact).abs().max() <= 0.02 * exact.abs().max()
    layer.unmerge()
    assert layer.weight.stride() == (1, rows)
    assert_same_bits(layer.weight, values, "base")


def test_a_sliced_weight_comes_back_with_its_strides():
    layer = make("linear")
    layer.weight = nn.Parameter(torch.randn(10, 12)[:, ::2], False)
    base, strides = layer.weight.detach().clone(), layer.weight.stride()
    exact = exact_weight(layer, layer.weight)
    layer.merge()
    torch.testing.assert_close(layer.weight.double(), exact, rtol=1e-7, atol=1e-6)
    layer.unmerge()
    assert layer.weight.stride() == strides
    assert_same_bits(layer.weight, base, "base")


def test_merging_inside_inference_mode_and_leaving_it():
    layer = make("linear").eval()
    base = layer.weight.detach().clone()
    with torch.inference_mode():
        layer.merge()
    layer(example(layer))
    layer.unmerge()
    assert_same_bits(layer.weight, base, "base")
    layer.train()(example(layer)).sum().backward()
