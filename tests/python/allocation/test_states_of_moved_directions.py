# A model's state is restored as it was taken, whatever a RankAllocator moved between.
import copy
import io

import pytest
import safetensors.torch
import torch
from allocation_models import (
    LAYERS,
    Network,
    assert_same_state,
    batch,
    network,
    train,
    trained,
)

import rankwise as rw

FREEZE, TOTAL = 8, 14
STOPS = (0, 4, FREEZE - 1, FREEZE, TOTAL)  # as made, masked, masked, shrunk, shrunk
OPTIONS = dict(total_steps=TOTAL, final_steps=TOTAL - FREEZE, warmup_steps=1)


def run(until: int, seed: int = 4, **options):
    model, allocator = network(**OPTIONS | options, seed=seed)
    optimizer = torch.optim.AdamW(trained(model), 0.03)
    allocator.attach(optimizer)
    train(model, optimizer, range(1, until + 1))
    return model, allocator, optimizer


def output(model) -> torch.Tensor:
    with torch.no_grad():
        return model(batch(0)[0])


def ranks(model) -> list[int]:
    return [model.get_submodule(name).rank for name in LAYERS]


def through_torch(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_safetensors(state: dict) -> dict:
    return safetensors.torch.load(safetensors.torch.save(state))


LOADS = {
    "strict": lambda model, state: model.load_state_dict(state),
    "not strict": lambda model, state: model.load_state_dict(state, strict=False),
    "assigned": lambda model, state: model.load_state_dict(state, assign=True),
    "torch.save": lambda model, state: model.load_state_dict(through_torch(state)),
    "safetensors": lambda model, state: model.load_state_dict(through_safetensors(state)),
}


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("shrink", [True, False], ids=["shrunk", "masked"])
@pytest.mark.parametrize("taken", STOPS)
def test_a_state_computes_what_it_did(taken, shrink, load):
    """Into a model at any step, also a fresh one with other weights."""
    model = run(taken, shrink=shrink)[0]
    state, wanted, rank = copy.deepcopy(model.state_dict()), output(model), ranks(model)
    for stop in STOPS:
        other = run(stop, seed=9, shrink=shrink)[0]
        assert LOADS[load](other, copy.deepcopy(state)) == ([], [])
        assert torch.equal(output(other), wanted) and ranks(other) == rank, stop
        assert_same_state(other.state_dict(), state)


def test_the_best_state_comes_back_to_the_model_that_went_on():
    model, _, optimizer = run(4)
    best, wanted = copy.deepcopy(model.state_dict()), output(model)
    train(model, optimizer, range(5, TOTAL + 1))
    last, end, shrunk = copy.deepcopy(model.state_dict()), output(model), ranks(model)
    assert sum(shrunk) == 6 and not torch.allclose(end, wanted)
    model.load_state_dict(best)
    assert torch.equal(output(model), wanted) and ranks(model) == [6, 6, 6]
    model.load_state_dict(last)
    assert torch.equal(output(model), end) and ranks(model) == shrunk


@pytest.mark.parametrize("taken, loaded", [(4, TOTAL), (TOTAL, 4), (TOTAL, 0)])
def test_training_on_without_the_allocators_state_is_refused(taken, loaded):
    state = run(taken)[0].state_dict()
    model, allocator, optimizer = run(loaded)
    model.load_state_dict(state)
    before, weights = allocator.state_dict(), copy.deepcopy(model.state_dict())
    words = "'first' has rank .*a state of another step was loaded.*the allocator's"
    with pytest.raises(RuntimeError, match=words):
        allocator.orthogonality_penalty()
    with pytest.raises(RuntimeError, match=words):
        allocator.step(None)
    assert_same_state(allocator.state_dict(), before)
    assert_same_state(model.state_dict(), weights)
    optimizer.zero_grad()


@pytest.mark.parametrize("first", ["model", "allocator"])
@pytest.mark.parametrize("loaded", STOPS)
@pytest.mark.parametrize("taken", STOPS)
def test_all_states_of_a_step_resume_it_in_any_order(taken, loaded, first):
    model, allocator, optimizer = run(taken)
    states = copy.deepcopy((model.state_dict(), allocator.state_dict(), optimizer.state_dict()))
    losses = train(model, optimizer, range(taken + 1, TOTAL + 3))
    other = run(loaded, seed=9)
    if first == "model":
        other[0].load_state_dict(states[0])
        other[1].load_state_dict(states[1])
    else:
        other[1].load_state_dict(states[1])
        other[0].load_state_dict(states[0])
    other[2].load_state_dict(states[2])
    assert train(other[0], other[2], range(taken + 1, TOTAL + 3)) == losses
    assert_same_state(other[0].state_dict(), model.state_dict())
    assert_same_state(other[1].state_dict(), allocator.state_dict())


@pytest.mark.parametrize("target_rank", [0, 2])
@pytest.mark.parametrize("taken", STOPS)
def test_an_allocator_made_after_the_model_was_loaded(taken, target_rank):
    model, allocator, optimizer = run(taken, target_rank=target_rank)
    states = copy.deepcopy((model.state_dict(), allocator.state_dict(), optimizer.state_dict()))
    losses = train(model, optimizer, range(taken + 1, TOTAL + 3))
    other, replaced = network(**OPTIONS, target_rank=target_rank, seed=9)
    other.load_state_dict(states[0])
    resumed = rw.RankAllocator(other, replaced.config)
    resumed.load_state_dict(states[1])
    again = torch.optim.AdamW(trained(other), 0.03)
    again.load_state_dict(states[2])
    resumed.attach(again)
    assert train(other, again, range(taken + 1, TOTAL + 3)) == losses
    assert_same_state(resumed.state_dict(), allocator.state_dict())


@pytest.mark.parametrize("first", ["model", "allocator"])
@pytest.mark.parametrize("taken", STOPS)
def test_states_without_an_order(taken, first):
    """As they were before states had one: with the allocator's state, or as the function alone."""
    model, allocator, optimizer = run(taken)
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("lora_directions")}
    state, allocation = copy.deepcopy((state, allocator.state_dict()))
    wanted, rank = output(model), ranks(model)
    for stop in (0, TOTAL):
        other, resumed, _ = run(stop, seed=9)
        if first == "allocator":
            resumed.load_state_dict(allocation)
        other.load_state_dict(state)
        torch.testing.assert_close(output(other), wanted, rtol=1e-12, atol=1e-12)
        resumed.load_state_dict(allocation)
        torch.testing.assert_close(output(other), wanted, rtol=1e-12, atol=1e-12)
        assert ranks(other) == rank
        loss = output(other).square().mean()
        assert loss.isfinite() and resumed.orthogonality_penalty().isfinite()


@pytest.mark.parametrize("without", ["lora_A", "lora_directions"])
def test_a_part_of_an_adapter_in_another_order_is_refused(without):
    model = run(TOTAL)[0]
    state = {k: v for k, v in run(4)[0].state_dict().items() if not k.endswith(without)}
    if without == "lora_directions":
        state = {k: v for k, v in state.items() if not k.endswith("lora_B")}
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="load lora_A, lora_B, lora_E and lora_directions toget"):
        model.load_state_dict(state, strict=False)
    assert all(torch.equal(model.state_dict()[k], before[k]) for k in before if "lora" in k)
    same = {k: v for k, v in before.items() if not k.endswith(without)}
    model.load_state_dict(same, strict=False)  # in its own order a part is one


def test_an_average_of_states_from_both_sides_of_the_freeze_is_refused():
    model, _, optimizer = run(FREEZE - 1)
    early = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(FREEZE, TOTAL + 1))
    late = model.state_dict()
    mixed = {k: 0.9 * early[k] + 0.1 * late[k] for k in late}
    with pytest.raises(RuntimeError, match="an average of states.*shrink=False"):
        model.load_state_dict(mixed)
    alike = {k: 0.75 * late[k] + 0.25 * late[k] for k in late}
    model.load_state_dict(alike)


def test_a_waiting_adapters_state():
    model, allocator, _ = run(TOTAL)
    wanted = output(model)
    for m in (model, fresh := network(**OPTIONS, seed=9)[0]):
        rw.add_adapter(m, "other", rw.LoRAConfig(target_modules=LAYERS, rank=4))
        rw.activate_adapter(m, "other")
    assert fresh.load_state_dict(model.state_dict()) == ([], [])
    rw.activate_adapter(fresh, "default")
    assert torch.equal(output(fresh), wanted)
    assert {name: fresh.get_submodule(name).rank for name in LAYERS} == allocator.ranks


def test_functional_call_with_a_state():
    model, _, optimizer = run(4)
    best, wanted = copy.deepcopy(model.state_dict()), output(model)
    train(model, optimizer, range(5, TOTAL + 1))
    end, shrunk = output(model), ranks(model)
    with torch.no_grad():
        assert torch.equal(torch.func.functional_call(model, best, batch(0)[0]), wanted)
    assert torch.equal(output(model), end) and ranks(model) == shrunk


def test_an_order_is_in_states_once_it_may_change():
    """Other states have the keys that they had, and a merged model's those of a plain one."""
    config = rw.AdaLoRAConfig(target_modules=LAYERS, **OPTIONS)
    for plain in (config, rw.LoRAConfig(target_modules=LAYERS)):
        model = rw.apply_lora(Network(), plain)
        rw.add_adapter(model, "other", plain)
        assert not [key for key in model.state_dict() if "directions" in key]
    assert not [key for key in run(TOTAL, shrink=False)[0].state_dict() if "directions" in key]

    model = run(0)[0]
    keys = list(model.state_dict())
    assert [key for key in keys if "directions" in key] == [f"{n}.lora_directions" for n in LAYERS]
    model = run(TOTAL)[0]
    assert list(model.state_dict()) == keys
    order = model.state_dict()["first.lora_directions"]
    assert order.shape == (6,) and order.dtype == torch.float32
    assert not [name for name, _ in model.named_buffers()]
    rw.merge(model)
    assert not [key for key in model.state_dict() if "lora" in key]


def test_directions_that_were_given_up_by_hand_or_by_a_folder():
    model = rw.apply_lora(Network(), rw.AdaLoRAConfig(target_modules=LAYERS, **OPTIONS))
    model.second.rank = 3
    torch.nn.init.normal_(model.second.lora_E)
    fresh = rw.apply_lora(Network(), rw.AdaLoRAConfig(target_modules=LAYERS, **OPTIONS))
    fresh.load_state_dict(model.state_dict())
    assert ranks(fresh) == [12, 3, 12] and torch.equal(output(fresh), output(model))
