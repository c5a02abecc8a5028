# attach(): every kind of optimizer, schedulers, closures, Accelerate, two optimizers, detaching.
import gc
import warnings
import weakref

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from allocation_models import LAYERS, assert_same_state, batch, loss_of, network, train, trained

TOTAL = 10
OPTIONS = dict(total_steps=TOTAL, final_steps=4, warmup_steps=2, allocation_interval=2)
OPTIMIZERS = {
    "plain": lambda p: torch.optim.AdamW(p, 0.03, foreach=False),
    "foreach": lambda p: torch.optim.AdamW(p, 0.03, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, 0.03, fused=True),
    "sgd fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "groups": lambda p: torch.optim.AdamW([{"params": p[:4]}, {"params": p[4:], "lr": 0.01}], 0.03),
}


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps its settings in the process."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def by_hand(make, steps):
    """The reference: the same run with allocator.step(optimizer) called between the lines."""
    model, allocator = network(**OPTIONS)
    optimizer = make(trained(model))
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        allocator.step(optimizer)
        losses.append(loss.item())
    return model, allocator, losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_attached_is_as_by_hand(name):
    wanted = by_hand(OPTIMIZERS[name], range(1, TOTAL + 1))
    model, allocator = network(**OPTIONS)
    optimizer = OPTIMIZERS[name](trained(model))
    allocator.attach(optimizer)
    assert train(model, optimizer, range(1, TOTAL + 1)) == wanted[2]
    assert_same_state(model.state_dict(), wanted[0].state_dict())
    assert_same_state(allocator.state_dict(), wanted[1].state_dict())
    assert allocator.steps == TOTAL and allocator.frozen


def test_with_a_learning_rate_schedule_and_clipping():
    model, allocator = network(**OPTIONS)
    optimizer = torch.optim.AdamW(trained(model), 0.03)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, TOTAL)
    allocator.attach(optimizer)
    for step in range(1, TOTAL + 1):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        torch.nn.utils.clip_grad_norm_(trained(model), 0.1)
        optimizer.step()
        schedule.step()
    assert allocator.steps == TOTAL and allocator.frozen


def test_remove_detaches():
    model, allocator = network(**OPTIONS)
    optimizer = torch.optim.AdamW(trained(model), 0.03)
    handle = allocator.attach(optimizer)
    train(model, optimizer, range(1, 4))
    before = allocator.state_dict()
    handle.remove()
    train(model, optimizer, range(4, TOTAL + 1))
    assert_same_state(allocator.state_dict(), before)
    assert allocator.steps == 3 and model.first.rank == 6
    allocator.attach(optimizer)
    train(model, optimizer, [4])
    assert allocator.steps == 4


def test_a_removed_allocator_is_freed():
    model, allocator = network(**OPTIONS)
    optimizer = torch.optim.AdamW(trained(model), 0.03)
    handle = allocator.attach(optimizer)
    train(model, optimizer, [1])
    alive = weakref.ref(allocator)
    handle.remove()
    del allocator
    gc.collect()
    assert alive() is None
    train(model, optimizer, [2])


def test_sgd_with_a_closure():
    wanted = by_hand(lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), range(1, TOTAL + 1))
    model, allocator = network(**OPTIONS)
    optimizer = torch.optim.SGD(trained(model), 0.1, momentum=0.9)
    allocator.attach(optimizer)
    losses = []
    for step in range(1, TOTAL + 1):

        def closure(step=step):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
    assert losses == wanted[2]
    assert_same_state(allocator.state_dict(), wanted[1].state_dict())


@pytest.mark.parametrize("with_head", [False, True], ids=["", "head first"])
def test_lbfgs(with_head):
    """One allocator step for each step(closure); its flat history cannot follow directions."""
    model, allocator = network(**OPTIONS)
    parameters = trained(model)
    if with_head:
        model.third.bias.requires_grad_(True)
        parameters = [model.third.bias, *parameters]
    optimizer = torch.optim.LBFGS(parameters, 0.1, max_iter=3)
    allocator.attach(optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1, TOTAL + 1):

            def closure(step=step):
                optimizer.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                return loss

            optimizer.step(closure)
            assert allocator.steps == step
    assert [w for w in caught if "masked in each step" in str(w.message)]
    assert [model.get_submodule(name).rank for name in LAYERS] == [6, 6, 6]
    assert sum(int((model.get_submodule(n).lora_E != 0).sum()) for n in LAYERS) == 6


@pytest.mark.parametrize("before", [True, False], ids=["before prepare", "after prepare"])
def test_accelerate_with_gradient_accumulation(before, fresh_accelerate):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model, allocator = network(**OPTIONS)
    optimizer = torch.optim.AdamW(trained(model), 0.03)
    data = torch.utils.data.TensorDataset(*map(torch.cat, zip(*map(batch, range(6)), strict=True)))
    loader = torch.utils.data.DataLoader(data, batch_size=5)
    if before:
        allocator.attach(optimizer)
    prepared, wrapped, loader = accelerator.prepare(model, optimizer, loader)
    if not before:
        allocator.attach(wrapped)
    steps = 0
    for _ in range(TOTAL // 2):
        for x, y in loader:
            with accelerator.accumulate(prepared):
                accelerator.backward((prepared(x) - y).square().mean())
                wrapped.step()
                wrapped.zero_grad()
            steps += accelerator.sync_gradients
            assert allocator.steps == steps
    assert steps == TOTAL and allocator.frozen and model.first.rank < 6

    other, reference = network(**OPTIONS)  # the same without Accelerate
    plain = torch.optim.AdamW(trained(other), 0.03)
    reference.attach(plain)
    for i in range(30):
        x, y = batch(i % 6)
        ((other(x) - y).square().mean() / 3).backward()
        if i % 3 == 2:
            plain.step()
            plain.zero_grad()
    assert_same_state(allocator.state_dict(), reference.state_dict())
    assert_same_state(model.state_dict(), other.state_dict())


def test_freeze_takes_accelerates_optimizer(fresh_accelerate):
    accelerator = Accelerator(cpu=True)
    model, allocator = network(**OPTIONS)
    optimizer = accelerator.prepare(torch.optim.AdamW(trained(model), 0.03))
    allocator.attach(optimizer)
    train(model, optimizer, range(1, 5))
    moments = {p: optimizer.state[p]["exp_avg"].clone() for p in trained(model)}
    allocator.freeze(optimizer)
    for name in LAYERS:
        layer, kept = model.get_submodule(name), allocator.pattern[name]
        got = optimizer.state[layer.lora_A]["exp_avg"][: layer.rank]
        assert torch.equal(got, moments[layer.lora_A][kept])


def test_two_optimizers_one_for_other_parameters():
    model, allocator = network(**OPTIONS)
    adapters = trained(model)
    model.third.bias.requires_grad_(True)
    optimizer, head = torch.optim.AdamW(adapters, 0.03), torch.optim.SGD([model.third.bias], 0.1)
    allocator.attach(optimizer)
    for step in range(1, TOTAL + 1):
        loss_of(model, step).backward()
        head.step()
        optimizer.step()
        head.zero_grad()
        optimizer.zero_grad()
    assert allocator.steps == TOTAL and model.first.rank < 6


def test_stateless_stepping_by_hand_shrinks():
    model, allocator = network(**OPTIONS)
    for step in range(1, TOTAL + 1):
        model.zero_grad()
        loss_of(model, step).backward()
        with torch.no_grad():
            for parameter in trained(model):
                parameter -= 0.1 * parameter.grad
        allocator.step(torch.optim.SGD(trained(model), 0.1))
    assert allocator.frozen and model.first.rank < 6
