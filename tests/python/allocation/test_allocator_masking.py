# Where shrinking is not possible or not wanted: masks after every step; freeze(); other adapters.
import warnings

import pytest
import torch
from allocation_models import LAYERS, batch, bench, loss_of, network, normal, train, trained

import rankwise as rw

FREEZE, TOTAL = 6, 12
OPTIONS = dict(total_steps=TOTAL, final_steps=TOTAL - FREEZE)


class Listed(torch.optim.SGD):
    """Keeps its momentum in a list, which the allocator cannot read."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("slots", [torch.zeros_like(p)])[0].add_(p.grad)


UNMOVABLE = {
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=2),
    "state in lists": lambda p: Listed(p, 0.1),
}


def closure_step(model, optimizer, step: int) -> None:
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        return loss

    optimizer.step(closure) if isinstance(optimizer, torch.optim.LBFGS) else (
        closure(), optimizer.step()
    )  # fmt: skip


def layers(model) -> list:
    return [model.get_submodule(name) for name in LAYERS]


def assert_masked(model, allocator) -> None:
    for name in LAYERS:
        layer, kept = model.get_submodule(name), allocator.pattern[name]
        assert layer.rank == 6 and len(kept) == 6
        assert not layer.lora_E[~kept].any(), f"{name}: a pruned direction is not zero"
        assert (layer.lora_E[kept] != 0).all()


@pytest.mark.parametrize("name", UNMOVABLE)
def test_state_that_cannot_move_gets_masks_and_one_warning(name):
    model, allocator = network(**OPTIONS)
    optimizer = UNMOVABLE[name](trained(model))
    allocator.attach(optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1, TOTAL + 3):
            closure_step(model, optimizer, step)
            if step >= FREEZE:
                assert_masked(model, allocator)
    messages = [str(w.message) for w in caught if "RankAllocator" in str(w.message)]
    assert len(messages) == 1 and "masked in each step" in messages[0], messages
    assert sum(allocator.ranks.values()) == 6


def test_shrink_false_masks_without_a_warning():
    model, allocator = network(**OPTIONS, shrink=False)
    optimizer = torch.optim.AdamW(trained(model), 0.05, weight_decay=0.1)
    allocator.attach(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(1, TOTAL + 3):
            train(model, optimizer, [step])
            if step >= FREEZE:
                assert_masked(model, allocator)
    pattern = allocator.pattern
    allocator.step(None)  # also by hand, with nothing from the optimizer
    assert all(torch.equal(a, pattern[n]) for n, a in allocator.pattern.items())


@pytest.mark.parametrize("final", [0, 1, 5])
@pytest.mark.parametrize("shrink", [True, False])
def test_after_the_last_step_nothing_pruned_is_left(final, shrink):
    model, allocator = network(total_steps=11, final_steps=final, shrink=shrink)
    optimizer = torch.optim.AdamW(trained(model), 0.05)
    allocator.attach(optimizer)
    train(model, optimizer, range(1, 12))
    assert allocator.frozen
    assert sum(int((layer.lora_E != 0).sum()) for layer in layers(model)) == 6
    assert [int((x.lora_E != 0).sum()) for x in layers(model)] == list(allocator.ranks.values())


def test_pruned_directions_return_before_the_freeze_only():
    b, random = bench([(3, 4), (5, 2)], [6, 6], target_rank=2, total_steps=30, shrink=False), 0
    random, kept, returned = normal(5), None, 0
    for step in range(1, 36):
        b.fill(random, gradients=False)
        b.fill(random, gradients=True)
        b.allocator.step(None)
        now = torch.cat(list(b.allocator.pattern.values()))
        if kept is not None:
            back = int((now & ~kept).sum())
            returned += back
            assert step <= 30 or back == 0
        kept = now
        zeros = torch.cat([layer.lora_E[:, 0] == 0 for layer in b.layers])
        assert torch.equal(zeros, ~now)
    assert returned > 0


@pytest.mark.parametrize("step", [0, 3])
def test_freeze_ends_a_training_early(step):
    model, allocator = network(total_steps=1000)
    optimizer = torch.optim.AdamW(trained(model), 0.05)
    allocator.attach(optimizer)
    train(model, optimizer, range(1, step + 1))
    scores = allocator.scores
    allocator.freeze(optimizer)
    best = sorted(range(18), key=lambda i: (-scores[i].item(), i))[:6]
    kept = torch.cat(list(allocator.pattern.values()))
    assert sorted(best) == kept.nonzero().squeeze(1).tolist()
    assert allocator.frozen and [x.rank for x in layers(model)] == list(allocator.ranks.values())
    assert allocator.history[-1].step == step and allocator.history[-1].budget == 6
    state = allocator.state_dict()
    allocator.freeze(optimizer)  # a second time changes nothing
    assert all(torch.equal(v, state[k]) for k, v in allocator.state_dict().items())
    train(model, optimizer, range(step + 1, step + 4))
    assert allocator.steps == step + 3


def test_freeze_while_another_adapter_is_active():
    model, allocator = network(total_steps=50)
    optimizer = torch.optim.AdamW(trained(model), 0.05)
    handle = allocator.attach(optimizer)
    train(model, optimizer, range(1, 6))
    rw.add_adapter(model, "other", rw.LoRAConfig(target_modules=LAYERS, rank=4))
    rw.activate_adapter(model, "other")
    handle.remove()
    before = [p.detach().clone() for p in trained(model)]
    y = model(batch(1)[0])
    allocator.freeze(optimizer)
    assert [layer.rank for layer in layers(model)] == [4, 4, 4]
    assert all(torch.equal(a, b) for a, b in zip(before, trained(model), strict=True))
    assert torch.equal(model(batch(1)[0]), y)
    ranks = allocator.ranks
    assert {n: model.get_submodule(n).held_adapter("default").rank for n in LAYERS} == ranks
    rw.activate_adapter(model, "default")
    assert {n: model.get_submodule(n).rank for n in LAYERS} == ranks
    handle = allocator.attach(optimizer)
    train(model, optimizer, range(6, 9))
    for layer in layers(model):
        assert not layer.lora_A[layer.rank :].any() and not layer.lora_E[layer.rank :].any()


def test_load_state_while_another_adapter_is_active():
    model, allocator = network(**OPTIONS)
    optimizer = torch.optim.AdamW(trained(model), 0.05)
    allocator.attach(optimizer)
    train(model, optimizer, range(1, FREEZE + 2))
    state, ranks = allocator.state_dict(), allocator.ranks
    fresh, other = network(**OPTIONS)
    rw.add_adapter(fresh, "other", rw.LoRAConfig(target_modules=LAYERS, rank=4))
    rw.activate_adapter(fresh, "other")
    other.load_state_dict(state)
    assert [layer.rank for layer in layers(fresh)] == [4, 4, 4]
    rw.activate_adapter(fresh, "default")
    assert {n: fresh.get_submodule(n).rank for n in LAYERS} == ranks == other.ranks


def test_deleting_the_adapter_does_not_break_a_late_freeze():
    model, allocator = network(total_steps=50)
    optimizer = torch.optim.SGD(trained(model), 0.05)
    allocator.attach(optimizer)
    train(model, optimizer, range(1, 4))
    rw.delete_adapter(model, "default")
    allocator.freeze(optimizer)
    assert allocator.frozen


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)]
)
def test_a_model_widened_meanwhile_goes_on(dtypes):
    first, second = dtypes
    model, allocator = network(first, total_steps=9, final_steps=2)
    train_by_hand(model, allocator, range(1, 4))
    scores = allocator.scores
    model.to(second)
    assert torch.equal(allocator.scores, scores)
    train_by_hand(model, allocator, range(4, 10))
    assert allocator.steps == 9 and allocator.frozen


def train_by_hand(model, allocator, steps) -> None:
    for step in steps:
        model.zero_grad()
        loss_of(model, step).backward()
        allocator.step(None)


def split_run(shrink: bool, attached: bool) -> list[float]:
    """A in one optimizer and B, E in another, as LoRA+ does it with two rates; the losses."""
    model, allocator = network(**OPTIONS, shrink=shrink)
    first = torch.optim.AdamW([p for n, p in model.named_parameters() if n.endswith("_A")], 0.01)
    rest = [p for n, p in model.named_parameters() if n.endswith(("_B", "_E"))]
    second = torch.optim.AdamW(rest, 0.03)
    if attached:
        allocator.attach(second)
    losses = []
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        for step in range(1, TOTAL + 4):
            first.zero_grad()
            second.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            first.step()
            second.step()
            if not attached:
                allocator.step()
            losses.append(loss.item())
    return losses


def test_two_optimizers_over_the_factors():
    """Shrunk or, when moments are out of reach, masked: training goes on as with shrink=False."""
    got, wanted = split_run(True, attached=True), split_run(False, attached=True)
    assert max(abs(a - b) for a, b in zip(got, wanted, strict=True)) <= 1e-11


def test_a_step_by_hand_that_forgets_the_optimizer():
    """Is refused, or masks: it must not move directions away from the moments in silence."""
    try:
        got, wanted = split_run(True, attached=False), split_run(False, attached=False)
    except TypeError:
        return
    assert max(abs(a - b) for a, b in zip(got, wanted, strict=True)) <= 1e-11
