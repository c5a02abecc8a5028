# Averages of a model's weights across the freeze: with it, or refused; copies stay what they are.
import copy

import pytest
import torch
from allocation_models import LAYERS, batch, network, train, trained
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

import rankwise as rw

FREEZE, TOTAL = 10, 20
OPTIONS = dict(total_steps=TOTAL, final_steps=TOTAL - FREEZE, warmup_steps=1)


def output(model) -> torch.Tensor:
    with torch.no_grad():
        return model(batch(0)[0])


def averaged(**options):
    def make(model):
        average = AveragedModel(model, **options)
        return average, lambda: average.update_parameters(model)

    return make


def by_hand(update):
    def make(model):
        average = copy.deepcopy(model)

        def step():
            with torch.no_grad():
                pairs = zip(average.parameters(), model.parameters(), strict=True)
                for mine, theirs in pairs:
                    update(mine, theirs)

        return average, step

    return make


def by_states(model):
    """As timm's ModelEmaV2."""
    average = copy.deepcopy(model)

    def step():
        states = average.state_dict(), model.state_dict()
        assert list(states[0]) == list(states[1])
        for mine, theirs in zip(*(state.values() for state in states), strict=True):
            mine.copy_(0.9 * mine + 0.1 * theirs)

    return average, step


def through_data(mine, theirs) -> None:
    mine.data.mul_(0.9).add_(theirs.data, alpha=0.1)


AVERAGES = {
    "ema": averaged(multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "ema, buffers": averaged(multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    "swa": averaged(multi_avg_fn=get_swa_multi_avg_fn()),
    "avg_fn": averaged(avg_fn=lambda mine, theirs, n: mine + 0.1 * (theirs - mine)),
    "lerp": by_hand(lambda mine, theirs: mine.lerp_(theirs, 0.1)),
    "data": by_hand(through_data),
    "states": by_states,
}


def run(name: str, shrink: bool, held: bool = False):
    """(model, average, their distances after each step)."""
    model, allocator = network(**OPTIONS, shrink=shrink)
    if held:
        model.allocator = allocator
    optimizer = torch.optim.SGD(trained(model), 0.05)
    allocator.attach(optimizer)
    average, update = AVERAGES[name](model)
    distances = []
    for step in range(1, TOTAL + 1):
        train(model, optimizer, [step])
        update()
        distances.append((output(average) - output(model)).abs().max().item())
    assert allocator.frozen
    return model, average, distances


@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_stays_with_the_model(name):
    """As it does where directions are not moved."""
    model, average, distances = run(name, shrink=True)
    unmoved = run(name, shrink=False)[2]
    assert [model.get_submodule(n).rank for n in LAYERS] != [6, 6, 6]
    assert any(model.get_submodule(n).directions.order != list(range(6)) for n in LAYERS)
    assert distances[: FREEZE - 1] == unmoved[: FREEZE - 1]
    assert max(distances[FREEZE - 1 :]) <= 1.5 * max(unmoved[FREEZE - 2 :])
    assert distances[-1] <= max(unmoved) and distances[-1] < 0.1


@pytest.mark.parametrize("name", AVERAGES)
def test_an_averages_state_is_restored(name):
    model, average, _ = run(name, shrink=True)
    average = getattr(average, "module", average)
    fresh = network(**OPTIONS, seed=9)[0]
    for other in (fresh, model):
        other.load_state_dict(average.state_dict())
        torch.testing.assert_close(output(other), output(average), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["ema", "lerp"])
def test_an_average_of_a_model_that_holds_its_allocator(name):
    """The average then has a copy of it, which makes no step."""
    distances, average = run(name, shrink=True, held=True)[2:0:-1]
    assert distances == run(name, shrink=True)[2]
    with pytest.raises(RuntimeError, match="than this allocator left it with"):
        getattr(average, "module", average).allocator.step(None)


def test_a_shadow_of_states_that_mixes_orders_is_refused():
    model, allocator = network(**OPTIONS)
    optimizer = torch.optim.SGD(trained(model), 0.05)
    allocator.attach(optimizer)
    shadow = copy.deepcopy(model.state_dict())
    for step in range(1, FREEZE + 2):
        train(model, optimizer, [step])
        for key, value in model.state_dict().items():
            shadow[key].lerp_(value, 0.1)
    with pytest.raises(RuntimeError, match="an average of states.*shrink=False"):
        model.load_state_dict(shadow)


def test_a_copy_that_was_kept_keeps_its_bits():
    model, allocator = network(**OPTIONS)
    optimizer = torch.optim.SGD(trained(model), 0.05)
    allocator.attach(optimizer)
    train(model, optimizer, range(1, 5))
    best = copy.deepcopy(model)
    refreshed = copy.deepcopy(model)
    train(model, optimizer, range(5, 7))
    refreshed.load_state_dict(model.state_dict())
    states = copy.deepcopy([best.state_dict(), refreshed.state_dict()])
    train(model, optimizer, range(7, TOTAL))
    for kept, state in zip((best, refreshed), states, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in kept.state_dict().items())


def test_a_copy_with_an_allocator_of_its_own_moves_by_itself():
    model, allocator = network(**OPTIONS)
    pair = {"model": model, "allocator": allocator}
    twins = [pair, copy.deepcopy(pair)]
    optimizers = [torch.optim.AdamW(trained(twin["model"]), 0.03) for twin in twins]
    for twin, optimizer in zip(twins, optimizers, strict=True):
        twin["allocator"].attach(optimizer)
    train(twins[1]["model"], optimizers[1], range(1, FREEZE))
    optimizers[1].zero_grad()
    state = copy.deepcopy(twins[1]["model"].state_dict())
    train(model, optimizers[0], range(1, TOTAL))
    after = twins[1]["model"].state_dict()
    assert all(torch.equal(value, state[key]) for key, value in after.items())
    train(twins[1]["model"], optimizers[1], range(FREEZE, TOTAL))
    got = twins[1]["model"].state_dict()
    assert all(torch.equal(value, got[key]) for key, value in model.state_dict().items())


def test_an_average_from_before_the_allocator_has_the_same_state():
    model = network(**OPTIONS)[0]
    rw.add_adapter(model, "later", config := rw.AdaLoRAConfig(target_modules=LAYERS, **OPTIONS))
    rw.activate_adapter(model, "later")
    average, update = by_states(model)
    allocator = rw.RankAllocator(model, config)
    optimizer = torch.optim.SGD(trained(model), 0.05)
    allocator.attach(optimizer)
    for step in range(1, TOTAL + 1):
        train(model, optimizer, [step])
        update()
    assert allocator.frozen and (output(average) - output(model)).abs().max() < 0.05
