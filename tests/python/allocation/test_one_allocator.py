# One allocator per adapter and at a time; parameters that replace others; copies and pickles.
import copy
import gc
import io
import pickle
import warnings

import pytest
import torch
from allocation_models import LAYERS, assert_same_state, network, train, trained
from torch import nn

import rankwise as rw

TOTAL = 10
OPTIONS = dict(total_steps=TOTAL, final_steps=4, warmup_steps=1)


def ready(**options):
    model, allocator = network(**OPTIONS | options)
    optimizer = torch.optim.AdamW(trained(model), 0.03)
    allocator.attach(optimizer)
    return model, allocator, optimizer


def ranks(model) -> list[int]:
    return [model.get_submodule(name).rank for name in LAYERS]


@pytest.mark.parametrize("steps", [1, 7, TOTAL])
def test_a_second_allocator_is_refused(steps):
    model, allocator, optimizer = ready()
    train(model, optimizer, range(1, steps + 1))
    with pytest.raises(ValueError, match="'first' has an allocator already.*detach()"):
        rw.RankAllocator(model, allocator.config)
    train(model, optimizer, range(steps + 1, TOTAL + 1))
    assert allocator.steps == TOTAL and sum(ranks(model)) == 6


def test_one_that_loaded_a_state_is_at_work_too():
    model, allocator, optimizer = ready()
    train(model, optimizer, [1])
    other, second, _ = ready()
    second.load_state_dict(allocator.state_dict())
    with pytest.raises(ValueError, match="has an allocator already"):
        rw.RankAllocator(other, second.config)


def test_one_that_made_no_step_gives_way():
    """A notebook's cell that is run twice before training."""
    model, replaced, optimizer = ready()
    allocator = rw.RankAllocator(model, replaced.config)
    allocator.attach(optimizer)
    train(model, optimizer, range(1, TOTAL + 1))
    assert allocator.steps == TOTAL and replaced.steps == 0 and sum(ranks(model)) == 6
    with pytest.raises(RuntimeError, match="no longer in charge"):
        replaced.step(None)
    with pytest.raises(RuntimeError, match="another allocator was made"):
        replaced.load_state_dict(allocator.state_dict())


def test_another_adapter_of_the_layers_has_its_own():
    model, allocator, optimizer = ready()
    train(model, optimizer, [1])
    rw.add_adapter(model, "other", allocator.config)
    rw.activate_adapter(model, "other")
    other = rw.RankAllocator(model, allocator.config)
    second = torch.optim.AdamW(trained(model), 0.03)
    other.attach(second)
    train(model, second, [1])
    rw.activate_adapter(model, "default")
    train(model, optimizer, [2])
    assert (allocator.steps, other.steps) == (2, 1)


def test_after_detach_another_prunes_what_is_left():
    model, allocator, optimizer = ready()
    train(model, optimizer, range(1, TOTAL + 1))
    allocator.detach()
    train(model, optimizer, [11])
    assert allocator.steps == TOTAL
    with pytest.raises(RuntimeError, match="no longer in charge: detach"):
        allocator.step(optimizer)
    again = rw.RankAllocator(model, allocator.config)
    again.attach(optimizer)
    with pytest.warns(UserWarning, match="an earlier schedule pruned 'first'.*load its state") as w:
        train(model, optimizer, range(1, TOTAL + 1))
    assert len(w) == 1 and again.frozen


def test_one_that_is_gone_is_not_in_the_way():
    model, allocator, optimizer = ready()
    train(model, optimizer, [1])
    config = allocator.config
    del allocator, optimizer
    gc.collect()
    allocator = rw.RankAllocator(model, config)
    optimizer = torch.optim.AdamW(trained(model), 0.03)
    allocator.attach(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, [1, 2])


def replace(model, how: str) -> None:
    state = copy.deepcopy(model.state_dict())
    if how == "assign":
        model.load_state_dict(state, assign=True)
    elif how == "to_empty":
        model.to("meta")
        model.to_empty(device="cpu")
        model.load_state_dict(state)
    else:
        for name in LAYERS:
            layer = model.get_submodule(name)
            for factor in ("lora_A", "lora_B", "lora_E"):
                setattr(layer, factor, nn.Parameter(getattr(layer, factor).detach().clone()))


@pytest.mark.parametrize("how", ["assign", "to_empty", "by hand"])
def test_parameters_replaced_before_training_are_followed(how):
    wanted = ready()
    train(wanted[0], wanted[2], range(1, TOTAL + 1))
    model, allocator = network(**OPTIONS)
    replace(model, how)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
    optimizer = torch.optim.AdamW(trained(model), 0.03)
    allocator.attach(optimizer)
    train(model, optimizer, range(1, TOTAL + 1))
    assert_same_state(model.state_dict(), wanted[0].state_dict())
    assert_same_state(allocator.state_dict(), wanted[1].state_dict())


@pytest.mark.parametrize("how", ["assign", "by hand"])
def test_parameters_replaced_under_an_optimizer_are_named(how):
    model, allocator, optimizer = ready()
    train(model, optimizer, range(1, 4))
    replace(model, how)
    for parameter in trained(model):
        parameter.grad = torch.ones_like(parameter)
    with pytest.warns(
        UserWarning, match="does not hold 'first.lora_A', 'first.lora_B', 'first.lor"
    ):
        optimizer.step()
    assert allocator.steps == 4


def test_replaced_by_another_shape_is_an_error():
    model, allocator, optimizer = ready()
    train(model, optimizer, [1])
    before = allocator.state_dict()
    model.second.lora_A = nn.Parameter(torch.zeros(6, 9, dtype=torch.float64))
    with pytest.raises(ValueError, match="the factors of 'second' were replaced"):
        allocator.step(None)
    assert_same_state(allocator.state_dict(), before)


def test_a_layers_switch_to_another_adapter_and_back_is_none():
    model, allocator, optimizer = ready()
    train(model, optimizer, range(1, 4))
    rw.add_adapter(model, "other", rw.LoRAConfig(target_modules=LAYERS))
    rw.activate_adapter(model, "other")
    rw.activate_adapter(model, "default")
    train(model, optimizer, range(4, TOTAL + 1))
    assert allocator.frozen and sum(ranks(model)) == 6


def pickled(value):
    return pickle.loads(pickle.dumps(value))


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class Trainer:
    """An object that holds an allocator and what belongs to it."""

    def __init__(self, allocator_first: bool, steps: int) -> None:
        model, allocator = network(**OPTIONS)
        self.optimizer = torch.optim.AdamW(trained(model), 0.03)
        self.handle = allocator.attach(self.optimizer)
        train(model, self.optimizer, range(1, steps + 1))
        self.optimizer.zero_grad()
        if allocator_first:
            self.allocator, self.model = allocator, model
        else:
            self.model, self.allocator = model, allocator


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("allocator_first", [True, False])
@pytest.mark.parametrize("steps", [0, 3, 6, TOTAL])
def test_a_copy_belongs_to_the_copied_model(steps, allocator_first, copied):
    first = Trainer(allocator_first, steps)
    second = copied(first)
    assert_same_state(second.allocator.state_dict(), first.allocator.state_dict())
    assert_same_state(second.model.state_dict(), first.model.state_dict())
    second.allocator.attach(second.optimizer)
    for trainer in (second, first):
        train(trainer.model, trainer.optimizer, range(steps + 1, TOTAL + 3))
    assert second.allocator.steps == first.allocator.steps == TOTAL + 2
    assert_same_state(second.allocator.state_dict(), first.allocator.state_dict())
    assert_same_state(second.model.state_dict(), first.model.state_dict())
    assert ranks(second.model) == ranks(first.model)
