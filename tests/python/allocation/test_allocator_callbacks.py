# What Python code that the allocator calls from C++ raises arrives with its type and its text.
import pytest
import torch
from allocation_models import assert_same_state, copied, loss_of, network, trained


class Mine(Exception):
    """No class that C++ knows."""


class Failing(dict):
    """An optimizer's state that cannot be asked."""

    def get(self, *_):
        raise Mine("state")


def test_an_optimizers_state_that_raises():
    model, allocator = network(total_steps=2, final_steps=1)
    optimizer = torch.optim.SGD(trained(model), 0.0, momentum=0.9)
    loss_of(model, 1).backward()
    optimizer.step()
    optimizer.state = Failing(optimizer.state)
    with pytest.raises(Mine, match="state"):
        allocator.freeze(optimizer)


def test_a_layer_that_refuses_its_new_rank(monkeypatch):
    model, allocator = network(total_steps=2, final_steps=1)
    optimizer = torch.optim.SGD(trained(model), 0.1)

    def refuse(layer, rank):
        raise Mine(f"rank {rank}")

    loss_of(model, 1).backward()
    monkeypatch.setattr(type(model.second), "rank", property(lambda self: 6, refuse), raising=False)
    with pytest.raises(Mine, match="rank"):
        allocator.freeze(optimizer)


@pytest.mark.parametrize("error", [Mine("loss"), KeyboardInterrupt(), SystemExit(3)])
def test_a_closure_that_raises_leaves_the_allocator(error):
    model, allocator = network(total_steps=9)
    optimizer = torch.optim.SGD(trained(model), 0.1)
    allocator.attach(optimizer)
    before = copied(allocator.state_dict())

    def closure():
        raise error

    with pytest.raises(type(error)):
        optimizer.step(closure)
    assert_same_state(allocator.state_dict(), before)


@pytest.mark.parametrize("error", [Mine("hook"), KeyboardInterrupt()])
def test_a_hook_that_raises_in_a_backward_pass(error):
    model, _ = network(total_steps=9)

    def hook(gradient):
        raise error

    model.second.lora_A.register_hook(hook)
    with pytest.raises(type(error)):
        loss_of(model, 1).backward()
