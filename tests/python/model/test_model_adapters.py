# Named adapters over one base: add, activate, delete, and a hundred switches that leave every bit.
import copy
import random

import pytest
import torch
from small_models import adapted, assert_base_bits, bert, gpt2, loss, output, randomise
from tolerances import assert_same_bits
from torch import nn

import rankwise as rw
from rankwise.config import LoRAConfig

CONFIGS = {
    "a": LoRAConfig(rank=2, target_modules=["query", "value"]),
    "ab": LoRAConfig(rank=4, alpha=2.0, target_modules=["query", "word_embeddings"], rslora=True),
    "abc": LoRAConfig(rank=1, target_modules=["dense"], modules_to_save=["pooler"]),
}


def three_tasks(model: nn.Module) -> nn.Module:
    for seed, (name, config) in enumerate(CONFIGS.items()):
        if seed == 0:
            rw.apply_lora(model, config, name)
        else:
            rw.add_adapter(model, name, config)
        rw.activate_adapter(model, name)
        randomise(model, seed)
    return model


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_a_hundred_random_switches_leave_base_and_outputs_bit_equal():
    plain = bert().eval()
    base = {name: value.clone() for name, value in plain.state_dict().items()}
    model = three_tasks(copy.deepcopy(plain))
    wanted = {}
    for name in (*CONFIGS, None):
        rw.activate_adapter(model, name)
        wanted[name] = output(model).detach().clone()
    assert_same_bits(wanted[None], output(plain).detach(), "the base's output")
    assert len({tuple(v.flatten().tolist()) for v in wanted.values()}) == 4
    choices = random.Random(5)
    for _ in range(100):
        name = choices.choice(list(wanted))
        rw.activate_adapter(model, name)
        merged = name is not None and choices.random() < 0.2
        if merged:
            rw.merge(model)
            rw.unmerge(model)
        assert_same_bits(output(model).detach(), wanted[name], f"output of {name}")
    rw.activate_adapter(model, None)
    assert_base_bits(model, base)


def test_switching_while_training_touches_the_active_adapter_only():
    model = three_tasks(bert())
    snapshots = {}
    for name in CONFIGS:
        rw.activate_adapter(model, name)
        snapshots[name] = {n: model.get_parameter(n).detach().clone() for n in trainable(model)}
    rw.activate_adapter(model, "ab")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    for name in ("a", "abc"):
        rw.activate_adapter(model, name)
        for key, value in snapshots[name].items():
            assert_same_bits(model.get_parameter(key).detach(), value, f"{name}: {key}")
    rw.activate_adapter(model, "ab")
    assert not all(torch.equal(model.get_parameter(n), v) for n, v in snapshots["ab"].items())


def test_an_optimizer_sees_only_the_active_adapters_parameters():
    model = three_tasks(bert())
    sizes = {}
    for name in CONFIGS:
        rw.activate_adapter(model, name)
        loss(model).backward()
        without = {n for n in trainable(model) if model.get_parameter(n).grad is None}
        frozen = {
            n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None
        }
        assert (without, frozen) == ({n for n in without if "pooler" in n}, set())
        sizes[name] = len(trainable(model))
        model.zero_grad()
    # 4 layers of a, 3 of ab; abc has dense in 2 x 3 layers and the pooler's weight and bias.
    assert sizes == {"a": 8, "ab": 6, "abc": 14}


def test_gradients_wait_with_their_adapter():
    """Accumulation over several tasks before one step of an optimizer over all of them."""
    model = three_tasks(bert())
    rw.activate_adapter(model, "a")
    loss(model).backward()
    found = {n: (p.grad, p.grad.clone()) for n, p in model.named_parameters() if p.requires_grad}
    for name in ("ab", None, "a"):
        rw.activate_adapter(model, name)
        if name is not None and name != "a":
            loss(model).backward()
    for name, (gradient, value) in found.items():
        assert model.get_parameter(name).grad is gradient
        assert_same_bits(gradient, value, name)


def test_names_in_order_and_layers_that_lack_one():
    model = three_tasks(bert())
    assert rw.adapter_names(model) == ["a", "ab", "abc"]
    rw.activate_adapter(model, "a")
    active = {name for name, layer in adapted(model).items() if layer.adapter == "a"}
    assert {n.split(".")[-1] for n in active} == {"query", "value"}
    rest = {n: layer for n, layer in adapted(model).items() if n not in active}
    assert rest and all(layer.adapter is None for layer in rest.values())


def test_deleting_a_name_inside_of_others_leaves_them():
    model = three_tasks(bert().eval())
    wanted = {}
    for name in ("a", "abc"):
        rw.activate_adapter(model, name)
        wanted[name] = output(model).detach()
    rw.delete_adapter(model, "ab")
    assert rw.adapter_names(model) == ["a", "abc"]
    assert not any(".ab." in name for name in model.state_dict())
    for name, value in wanted.items():
        rw.activate_adapter(model, name)
        assert_same_bits(output(model).detach(), value, name)


def test_deleting_the_active_adapter_leaves_the_base():
    plain = bert().eval()
    model = three_tasks(copy.deepcopy(plain))
    for name in CONFIGS:
        rw.activate_adapter(model, name)
        rw.delete_adapter(model, name)
        assert_same_bits(output(model).detach(), output(plain).detach(), "base")
        assert trainable(model) == set()
    assert rw.adapter_names(model) == []
    assert_base_bits(model, plain.state_dict())
    assert not any("lora" in name for name in model.state_dict())


def test_delete_and_add_of_the_same_name_is_fresh():
    plain = bert().eval()
    model = three_tasks(copy.deepcopy(plain))
    rw.activate_adapter(model, "ab")
    loss(model).backward()
    rw.delete_adapter(model, "ab")
    rw.add_adapter(model, "ab", LoRAConfig(rank=3, target_modules=["key"]))
    rw.activate_adapter(model, "ab")
    used = {n.split(".")[-1] for n, layer in adapted(model).items() if layer.adapter == "ab"}
    assert used == {"key"}
    assert all(p.grad is None for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(output(model), output(plain), rtol=1e-6, atol=1e-6)


def test_adapters_of_the_same_seed_and_configuration_are_equal_whoever_is_active():
    model = rw.apply_lora(bert(), CONFIGS["a"], "first")
    starts = []
    for name in ("second", "third"):
        torch.manual_seed(11)
        rw.add_adapter(model, name, CONFIGS["a"])
        rw.activate_adapter(model, name)
        starts.append({n: model.get_parameter(n).detach().clone() for n in trainable(model)})
    assert starts[0].keys() == starts[1].keys()
    for name, value in starts[0].items():
        assert_same_bits(starts[1][name], value, name)


def test_activating_the_active_one_changes_nothing():
    model = three_tasks(bert())
    loss(model).backward()
    before = {n: (p, p.grad) for n, p in model.named_parameters()}
    rw.activate_adapter(model, "abc")
    after = {n: (p, p.grad) for n, p in model.named_parameters()}
    assert all(after[n][0] is p and after[n][1] is g for n, (p, g) in before.items())
    assert before.keys() == after.keys()


def test_transposed_layers_switch_too():
    plain = gpt2().eval()
    model = rw.apply_lora(copy.deepcopy(plain), LoRAConfig(rank=2, target_modules=["c_attn"]), "a")
    rw.add_adapter(model, "b", LoRAConfig(rank=3, target_modules=["c_fc", "c_attn"]))
    for name in ("a", "b"):
        rw.activate_adapter(model, name)
        randomise(model)
        assert not torch.equal(output(model), output(plain))
    rw.activate_adapter(model, None)
    assert_same_bits(output(model).detach(), output(plain).detach(), "base")
    assert_base_bits(model, plain.state_dict())


@pytest.mark.parametrize("active", ["a", "b", None])
def test_layers_put_in_by_hand_work_with_the_model_functions(active):
    model = nn.Sequential(rw.nn.LoRALinear(4, 4, rank=2), nn.Tanh(), rw.nn.AdaLoRALinear(4, 2))
    assert rw.adapter_names(model) == ["default"]
    assert rw.summary(model).trainable == 16 + 8 * (4 + 2 + 1)
    for name in ("a", "b"):
        rw.add_adapter(model, name, LoRAConfig(rank=1, target_modules="all-linear"))
    rw.activate_adapter(model, active)
    assert [layer.adapter for layer in adapted(model).values()] == [active, active]
    rw.activate_adapter(model, "default")
    assert set(rw.merge(model)) == {"0", "2"}
    rw.unmerge(model)
    rw.delete_adapter(model, "default")
    assert rw.adapter_names(model) == ["a", "b"]


def test_a_layer_put_in_after_the_first_call_is_not_overlooked():
    model = nn.Sequential(rw.nn.LoRALinear(4, 4, rank=2), nn.Tanh(), nn.Linear(4, 2))
    assert rw.adapter_names(model) == ["default"]
    model[2] = rw.nn.LoRALinear.from_linear(model[2], rank=2)
    model[2].add_adapter("late", model[2].options)
    assert rw.adapter_names(model) == ["default", "late"]
