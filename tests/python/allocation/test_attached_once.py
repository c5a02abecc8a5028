# attach(): once; several optimizers step in rounds; parameters that no optimizer holds are named.
import gc
import warnings

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from allocation_models import (
    LAYERS,
    Network,
    assert_same_state,
    loss_of,
    network,
    train,
    trained,
)
from torch.amp import GradScaler

import rankwise as rw

TOTAL = 10
OPTIONS = dict(total_steps=TOTAL, final_steps=4, warmup_steps=1)
TWICE = "attached already.*double speed.*remove.*attach\\(first, second\\)"


@pytest.fixture
def fresh_accelerate():
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def adamw(parameters, rate: float = 0.03, **options) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, rate, **options)


def test_to_the_same_optimizer():
    model, allocator = network(**OPTIONS)
    optimizer = adamw(trained(model))
    handle = allocator.attach(optimizer)
    with pytest.raises(RuntimeError, match=TWICE):
        allocator.attach(optimizer)
    train(model, optimizer, [1])
    assert allocator.steps == 1
    handle.remove()
    with allocator.attach(optimizer):
        train(model, optimizer, [2])
    train(model, optimizer, [3])
    assert allocator.steps == 2


def test_to_another_optimizer_over_the_same_factors():
    model, allocator = network(**OPTIONS)
    first, second = adamw(trained(model)), adamw(trained(model))
    allocator.attach(first)
    with pytest.raises(RuntimeError, match=TWICE):
        allocator.attach(second)
    with pytest.raises(ValueError, match="the same optimizer was given twice"):
        network(**OPTIONS)[1].attach(first, first)


def test_to_accelerates_wrapper_of_the_same(fresh_accelerate):
    model, allocator = network(**OPTIONS)
    optimizer = adamw(trained(model))
    allocator.attach(optimizer)
    wrapped = Accelerator(cpu=True).prepare(optimizer)
    with pytest.raises(RuntimeError, match=TWICE):
        allocator.attach(wrapped)


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_new_optimizer_in_the_place_of_one_that_is_gone(scheduled):
    model, allocator = network(**OPTIONS)
    optimizer = adamw(trained(model))
    if scheduled:  # makes a cycle of references
        torch.optim.lr_scheduler.LinearLR(optimizer)
    handle = allocator.attach(optimizer)
    train(model, optimizer, [1])
    gc.disable()
    optimizer = torch.optim.SGD(trained(model), 0.1)
    allocator.attach(optimizer)
    gc.enable()
    train(model, optimizer, [2])
    assert allocator.steps == 2
    handle.remove()
    train(model, optimizer, [3])
    assert allocator.steps == 3


def test_a_step_by_hand_of_an_attached_one_is_warned_of_once():
    model, allocator = network(**OPTIONS)
    optimizer = adamw(trained(model))
    allocator.attach(optimizer)
    train(model, optimizer, [1])
    with pytest.warns(UserWarning, match="double speed") as caught:
        allocator.step(optimizer)
        allocator.step(optimizer)
    assert len(caught) == 1


def split(model, A_rate: float, **options):
    """LoRA+ with an optimizer for A and one for B and E."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    first = adamw([p for n, p in named if n.endswith("_A")], A_rate, **options)
    return first, adamw([p for n, p in named if not n.endswith("_A")], **options)


@pytest.mark.parametrize("order", [1, -1], ids=["in order", "the other way"])
@pytest.mark.parametrize("attached", [True, False])
def test_two_optimizers_are_as_one_with_two_groups(attached, order):
    model, allocator = network(**OPTIONS)
    rates = [{"params": p} for p in (o.param_groups[0]["params"] for o in split(model, 0.01))]
    rates[0]["lr"] = 0.01
    optimizer = adamw(rates)
    allocator.attach(optimizer)
    losses = train(model, optimizer, range(1, TOTAL + 3))
    assert allocator.frozen and [model.get_submodule(n).rank for n in LAYERS] != [6, 6, 6]

    other, rounds = network(**OPTIONS)
    optimizers = split(other, 0.01)
    handle = rounds.attach(*optimizers) if attached else None
    got = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(1, TOTAL + 3):
            other.zero_grad()
            loss = loss_of(other, step)
            loss.backward()
            for each in optimizers[::order]:
                each.step()
            if not attached:
                rounds.step(*optimizers)
            got.append(loss.item())
            assert rounds.steps == step
    assert got == losses
    assert_same_state(other.state_dict(), model.state_dict())
    assert_same_state(rounds.state_dict(), allocator.state_dict())
    if attached:
        handle.remove()
        for each in optimizers:
            each.step()
        assert rounds.steps == TOTAL + 2


@pytest.mark.parametrize("fused", [False, True])
def test_two_optimizers_under_a_scaler(fused):
    """A step that one of them was left out of is none."""
    model, allocator = network(torch.float32, **OPTIONS)
    optimizers = split(model, 0.01, fused=fused)
    allocator.attach(*optimizers)
    scaler = GradScaler("cpu", init_scale=2.0**10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(1, 7):
            model.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            if step == 3:
                model.second.lora_A.grad[0] = float("inf")
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
    assert allocator.steps == 5 and allocator.skipped_steps == fused


def test_one_of_two_that_never_steps_is_warned_of():
    model, allocator = network(**OPTIONS)
    first, second = split(model, 0.01)
    allocator.attach(first, second)
    with pytest.warns(UserWarning, match="stepped twice before another") as caught:
        train(model, first, range(1, 5))
    assert len(caught) == 1 and allocator.steps == 0
    assert caught[0].filename == train.__code__.co_filename, "it points at who stepped"


def test_an_optimizer_from_before_the_adapters():
    """It steps, the allocator prunes, and nothing trains: the parameters are named, once."""
    torch.manual_seed(0)
    model = Network()
    optimizer = adamw(list(model.parameters()))
    config = rw.AdaLoRAConfig(target_modules=LAYERS, **OPTIONS)
    allocator = rw.RankAllocator(rw.apply_lora(model, config), config)
    allocator.attach(optimizer)
    with pytest.warns(UserWarning) as caught:
        train(model, optimizer, range(1, 4))
    (message,) = [str(w.message) for w in caught]
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 9 and all(f"'{name}'" in message for name in names)
    report = rw.health_check(model, optimizer)
    assert [p for p in report.problems if p.startswith("first.lora_A: the optimizer does not hold")]
    assert len(report.problems) == 9 and rw.health_check(model).ok
    assert rw.health_check(model, optimizer, adamw(trained(model))).ok


@pytest.mark.parametrize("by_hand", [False, True])
def test_only_what_nobody_holds_is_named(by_hand):
    model, allocator = network(**OPTIONS)
    model.third.lora_A.requires_grad_(False)
    optimizer = adamw([p for n, p in model.named_parameters() if n.startswith("first")])
    if not by_hand:
        allocator.attach(optimizer)
    loss_of(model, 1).backward()
    with pytest.warns(UserWarning, match="does not hold") as caught:
        optimizer.step()
        if by_hand:
            allocator.step(optimizer)
    (message,) = [str(w.message) for w in caught if "does not hold" in str(w.message)]
    assert "second.lora_A" in message and "third.lora_B" in message
    assert "first" not in message and "third.lora_A" not in message


def test_parameters_added_to_the_optimizer_before_it_steps():
    model, allocator = network(**OPTIONS)
    optimizer = adamw([model.third.lora_A])
    allocator.attach(optimizer)
    rest = [p for p in trained(model) if p is not model.third.lora_A]
    optimizer.add_param_group({"params": rest})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, range(1, 4))
