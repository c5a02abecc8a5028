# What goes wrong in PEFT's AdaLoRA, each beside an accelerated model that does it right.
from __future__ import annotations

import peft
import pytest
import torch
from adalora_runs import STEPS, Schedule, Tower, masks, sigmas, train, trained

import rankwise.integrations.peft as rp


def pair(**options):
    stock, ours = Schedule(**options).model(), Schedule(**options).model()
    rp.accelerate(ours)
    return stock, ours


def kept(model) -> int:
    return sum(map(sum, masks(model)))


def step_with(model, optimizer, gradient, number: int) -> None:
    """One step whose gradients `gradient(parameter, index)` makes."""
    for index, parameter in enumerate(trained(model)):
        parameter.grad = gradient(parameter, index)
    optimizer.step()
    model.base_model.update_and_allocate(number)
    optimizer.zero_grad()


# B: as many directions at the end as at the start


def test_nothing_to_prune():
    stock, ours = pair(target_r=6)
    with pytest.raises(RuntimeError, match="k"):
        train(stock, first=1)
    train(ours, first=1)
    assert kept(ours) == 12


def test_a_target_above_the_first_rank_is_refused_before_training():
    stock = Schedule(init_r=4, target_r=6).model()
    with pytest.raises(ValueError, match="target_rank must be from 0 to initial_rank 4"):
        rp.accelerate(stock)
    assert type(stock.base_model) is peft.tuners.AdaLoraModel  # as it was
    with pytest.raises(RuntimeError):
        train(stock, first=1)


# D, D2: gradients that are not finite


@pytest.mark.parametrize("where", ["everywhere", "in one layer"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_step_of_gradients_that_are_not_finite(where, value):
    def broken(parameter, index):
        bad = where == "everywhere" or index < 3
        return torch.full_like(parameter, value) if bad else torch.ones_like(parameter)

    def run(model):
        train(model, first=1, steps=5)
        values = [parameter.detach().clone() for parameter in trained(model)]
        optimizer = torch.optim.SGD(trained(model), lr=0.0)  # a scaler leaves such a step out
        step_with(model, optimizer, broken, 6)
        with torch.no_grad():
            for parameter, value in zip(trained(model), values, strict=True):
                parameter.copy_(value)
        train(model, first=7, steps=STEPS - 6)
        return kept(model)

    stock, ours = pair(tfinal=4)
    assert run(stock) != 4
    assert run(ours) == 4


# E: what was pruned and grows again


def test_live_and_saved_models_agree_after_an_optimizer_step_without_a_call(tmp_path):
    def saved_differently(model, finish) -> bool:
        train(model, first=1)
        optimizer = torch.optim.SGD(trained(model), lr=1.0)
        for parameter in trained(model):
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        finish()
        x = torch.ones(2, 8)
        expected = model(x)
        model.save_pretrained(tmp_path)
        torch.manual_seed(0)
        read = peft.PeftModel.from_pretrained(Tower(), tmp_path)
        return not torch.allclose(read(x), expected, atol=1e-5)

    stock, ours = pair(tfinal=5)
    assert saved_differently(stock, lambda: None)
    assert not saved_differently(ours, ours.base_model.rankallocator.finish)
    ours = pair(tfinal=5)[1]
    assert not saved_differently(ours, lambda: None)


# F: an interval longer than the window, and the last step left out


def test_the_final_step_left_out():
    stock, ours = pair(tfinal=5, deltaT=100)
    numbers = [n for n in range(1, STEPS + 1) if n != STEPS - 5]

    def run(model):
        optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
        random = torch.Generator().manual_seed(3)
        for number in numbers:
            model(torch.randn(4, 8, generator=random)).pow(2).mean().backward()
            optimizer.step()
            model.base_model.update_and_allocate(number)
            optimizer.zero_grad()
        return kept(model)

    with pytest.raises(AttributeError):
        run(stock)
    assert run(ours) == 4


def test_every_second_step():
    _, ours = pair(tfinal=5)
    optimizer = torch.optim.AdamW(trained(ours), lr=1e-2)
    for number in range(0, STEPS + 2, 2):
        ours(torch.randn(4, 8)).pow(2).mean().backward()
        optimizer.step()
        ours.base_model.update_and_allocate(number)
        optimizer.zero_grad()
    assert kept(ours) == 4 and ours.base_model.rankallocator.frozen


# G: equal scores


def test_equal_scores_keep_the_budget():
    def run(model):
        optimizer = torch.optim.SGD(trained(model), lr=0.0)
        with torch.no_grad():
            for sigma in sigmas(model):
                sigma.fill_(1.0)
        for number in range(1, STEPS + 1):
            step_with(model, optimizer, lambda p, index: torch.zeros_like(p), number)
        return kept(model)

    stock, ours = pair()
    assert run(stock) == 0
    assert run(ours) == 4


# H: parameters without a gradient


def test_a_layer_without_gradients():
    def run(model):
        optimizer = torch.optim.SGD(trained(model), lr=0.01)
        for number in range(1, STEPS + 1):
            step_with(model, optimizer, lambda p, i: torch.rand_like(p) if i < 3 else None, number)
        return kept(model)

    stock, ours = pair()
    with pytest.raises(TypeError):
        run(stock)
    with pytest.warns(UserWarning, match="no gradient in step 1 for .*second"):
        run(ours)
    assert sum(ours.base_model.rankallocator.ranks.values()) == 4


def test_gradients_that_are_gone_already():
    """As in a Trainer's on_step_end."""
    stock, ours = pair()
    with pytest.raises(TypeError):
        stock.base_model.update_and_allocate(1)
    with pytest.raises(RuntimeError, match="after optimizer.step\\(\\) and before zero_grad"):
        ours.base_model.update_and_allocate(1)


# R1, R2: a training that goes on from a checkpoint


@pytest.mark.parametrize("at", [12, 27], ids=["before the pattern is final", "after it"])
def test_resume(at, tmp_path):
    def checkpoint(model):
        train(model, first=1, steps=at)
        model.save_pretrained(tmp_path)

    def resumed():
        model = Schedule(tfinal=5).model()
        return model, lambda: model.load_adapter(tmp_path, "default", is_trainable=True)

    stock, ours = pair(tfinal=5)
    checkpoint(stock)
    model, load = resumed()
    with pytest.raises(RuntimeError):
        load()
        train(model, first=at + 1, steps=STEPS - at)
    checkpoint(ours)
    model, load = resumed()
    rp.accelerate(model)
    load()
    state = ours.base_model.rankallocator.state_dict()
    model.base_model.rankallocator.load_state_dict(state)
    expected = train(ours, first=at + 1, steps=STEPS - at)
    assert train(model, first=at + 1, steps=STEPS - at) == expected
    for mine, other in zip(sigmas(model), sigmas(ours), strict=True):
        assert torch.equal(mine, other)


def test_going_on_with_a_finished_folder(tmp_path):
    _, ours = pair(tfinal=5)
    train(ours, first=1)
    ours.base_model.rankallocator.finish()
    ours.save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = peft.PeftModel.from_pretrained(Tower(), tmp_path, is_trainable=True)
    rp.accelerate(model)
    before = masks(model)
    assert train(model, first=1)[-1] == before and kept(model) == 4


def test_loading_an_earlier_checkpoint_after_the_training(tmp_path):
    """load_best_model_at_end, with the best before the pattern was final."""

    def best_after_training(model):
        train(model, first=1, steps=10)
        model.save_pretrained(tmp_path)
        expected = model(torch.ones(2, 8))
        train(model, first=11, steps=STEPS - 10)
        model.load_adapter(tmp_path, "default", is_trainable=True)
        return expected

    stock, ours = pair(tfinal=5)
    with pytest.raises(RuntimeError, match="size mismatch"):
        best_after_training(stock)
    expected = best_after_training(ours)
    assert torch.equal(ours(torch.ones(2, 8)), expected)
    ours.base_model.rankallocator.finish()
    assert torch.equal(ours(torch.ones(2, 8)), expected)


# The adapter's name is part of others


def test_an_adapter_whose_name_is_in_module_names():
    def build():
        torch.manual_seed(0)
        config = Schedule().config(target_modules=["first", "second"])
        return peft.get_peft_model(Tower(), config, adapter_name="s")

    ours = build()
    rp.accelerate(ours)
    train(ours, first=1)
    assert sum(ours.base_model.rankallocator.ranks.values()) == 4
    ours.base_model.rankallocator.finish()
    assert sum(map(sum, ours.peft_config["s"].rank_pattern.values())) >= 4
