# Named adapters of one layer: add, activate, delete, switch off; the base and the others untouched.
import pytest
import torch
from layer_cases import KINDS, example, factors, make, randomise
from tolerances import assert_same_bits
from torch import nn

import rankwise as rw
from rankwise.config import AdapterOptions


def with_adapters(kind: str, *names: str) -> nn.Module:
    """A layer whose adapters differ in rank and values; the last one is active."""
    layer = make(kind, torch.float64)
    for seed, name in enumerate(names, start=10):
        layer.add_adapter(name, AdapterOptions(rank=seed - 8, alpha=float(seed)))
        layer.activate_adapter(name)
        randomise(layer, seed)
    return layer


@pytest.mark.parametrize("kind", KINDS)
def test_each_adapter_gives_its_own_output_again_and_again(kind):
    layer = with_adapters(kind, "a", "ab", "abc")
    x = example(layer)
    base = layer.weight.detach().clone()
    wanted = {}
    for name in ("default", "a", "ab", "abc", None):
        layer.activate_adapter(name)
        wanted[name] = layer(x).detach().clone()
    assert len({tuple(v.flatten().tolist()) for v in wanted.values()}) == 5
    for name in ("ab", "a", None, "abc", "a", "default", "ab", None, "ab"):
        layer.activate_adapter(name)
        assert layer.adapter == name
        assert_same_bits(layer(x).detach(), wanted[name], f"output of {name}")
    assert_same_bits(layer.weight, base, "base")


def test_rank_scaling_and_options_belong_to_the_adapter():
    layer = with_adapters("linear", "a", "b")
    assert (layer.adapter, layer.rank, layer.alpha, layer.scaling) == ("b", 3, 11.0, 11 / 3)
    layer.activate_adapter("a")
    assert (layer.adapter, layer.rank, layer.alpha, layer.scaling) == ("a", 2, 10.0, 5.0)
    layer.activate_adapter(None)
    assert (layer.adapter, layer.rank, layer.capacity, layer.scaling) == (None, 0, 0, 0.0)
    assert sorted(layer.adapter_names) == ["a", "b", "default"]


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_active_adapter_trains(kind):
    layer = with_adapters(kind, "a", "b")
    for name in ("a", "b", "default"):
        layer.activate_adapter(name)
        trained = [n for n, p in layer.named_parameters() if p.requires_grad]
        assert trained == list(factors(layer))
        layer(example(layer)).sum().backward()
        assert all(f.grad is not None for f in factors(layer).values())
        layer.zero_grad()
    layer.activate_adapter(None)
    assert not any(p.requires_grad for p in layer.parameters())


def test_a_stored_adapter_is_not_moved_by_training_the_active_one():
    layer = with_adapters("linear", "a")
    stored = {k: v.clone() for k, v in layer.state_dict().items() if k.startswith("adapters.")}
    assert set(stored) == {"adapters.default.lora_A", "adapters.default.lora_B"}
    optimizer = torch.optim.AdamW(layer.parameters(), 0.1, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        layer(example(layer)).square().sum().backward()
        optimizer.step()
    for key, value in stored.items():
        assert_same_bits(layer.state_dict()[key], value, key)


def test_adding_does_not_change_the_active_adapter():
    layer = with_adapters("linear", "a")
    x = example(layer)
    before = layer(x)
    layer.add_adapter("b", AdapterOptions(rank=7))
    assert layer.adapter == "a"
    assert_same_bits(layer(x), before, "output")


@pytest.mark.parametrize("kind", KINDS)
def test_delete_and_add_of_the_same_name_starts_afresh(kind):
    layer = with_adapters(kind, "a")
    x = example(layer)
    layer(x).sum().backward()
    old = {name: f.detach().clone() for name, f in factors(layer).items()}
    layer.delete_adapter("a")
    assert layer.adapter is None and layer.adapter_names == ["default"]
    plain = layer(x)
    layer.add_adapter("a", AdapterOptions(rank=3))
    layer.activate_adapter("a")
    assert all(f.grad is None for f in factors(layer).values())
    assert not all(torch.equal(old[n], f) for n, f in factors(layer).items() if n in old)
    torch.testing.assert_close(layer(x), plain, rtol=1e-14, atol=1e-14)


def test_deleting_one_of_two_names_that_contain_each_other():
    layer = with_adapters("linear", "a", "ab", "b")
    layer.delete_adapter("a")
    assert sorted(layer.adapter_names) == ["ab", "b", "default"]
    layer.activate_adapter("ab")
    assert layer.rank == 3


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "..", None, 5])
def test_names_that_cannot_be_folders_are_refused(name):
    layer = make("linear")
    with pytest.raises((ValueError, TypeError), match="name must be a word"):
        layer.add_adapter(name, AdapterOptions())
    assert layer.adapter_names == ["default"]


@pytest.mark.parametrize("name", ["train", "keys", "forward", "type", "half", "pop"])
def test_names_of_a_modules_methods_work_or_are_refused_as_names(name):
    """Adapters are kept in modules, whose attribute names must not leak out as a KeyError."""
    layer = make("linear")
    x = example(layer)
    before = layer(x)
    try:
        layer.add_adapter(name, AdapterOptions(rank=2))
    except ValueError as error:
        assert "name must be" in str(error) and repr(name) in str(error)
    else:
        layer.activate_adapter(name)
        randomise(layer)
        layer.activate_adapter("default")
        layer.delete_adapter(name)
    assert_same_bits(layer(x), before, "output")
    assert layer.adapter_names == ["default"]


def test_a_name_there_already_is_refused():
    layer = with_adapters("linear", "a")
    for name in ("a", "default"):
        with pytest.raises(ValueError, match=f"there is an adapter '{name}' already"):
            layer.add_adapter(name, AdapterOptions())


def test_deleting_an_unknown_name_lists_those_there_are():
    layer = with_adapters("linear", "a")
    with pytest.raises(KeyError, match=r"adapters are \['a', 'default'\], got 'b'"):
        layer.delete_adapter("b")


def test_switched_off_it_computes_the_base_merged_or_not():
    layer = with_adapters("linear", "a").eval()
    x = example(layer)
    layer.activate_adapter(None)
    base = layer(x)
    layer.activate_adapter("a")
    adapted = layer(x)
    layer.adapters_enabled = False
    assert_same_bits(layer(x).detach(), base.detach(), "switched off")
    layer.merge()
    assert_same_bits(layer(x).detach(), base.detach(), "merged and switched off")
    layer.adapters_enabled = True
    torch.testing.assert_close(layer(x), adapted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_adding_while_merged_looks_at_the_dtype_of_the_base_and_leaves_the_merge(kind):
    layer = make(kind, torch.bfloat16).eval()
    base = layer.weight.detach().clone()
    layer.merge()
    output = layer(example(layer))
    layer.add_adapter("a", AdapterOptions(rank=2))
    assert layer.merged
    assert_same_bits(layer(example(layer)), output, "output")
    layer.unmerge()
    assert_same_bits(layer.weight, base, "base")
    layer.activate_adapter("a")
    assert layer.lora_A.dtype == torch.float32


def test_dropout_belongs_to_training_and_to_the_adapter():
    layer = rw.nn.LoRALinear(6, 10, rank=4, dropout=0.5)
    randomise(layer)
    x = example(layer)
    assert not torch.equal(layer(x), layer(x))
    layer.add_adapter("dry", AdapterOptions(rank=2))
    layer.activate_adapter("dry")
    randomise(layer)
    assert layer.dropout == 0.0
    assert_same_bits(layer(x), layer(x), "without dropout")
    layer.activate_adapter("default")
    assert layer.dropout == 0.5
    layer.eval()
    assert_same_bits(layer(x), layer(x), "in eval mode")
