# Stopping at any step and going on from files: losses, masks, weights, moments bit for bit.
import io

import pytest
import torch
from allocation_models import assert_same_state, network, train, trained

TOTAL = 50
ADAMW = dict(lr=0.02, weight_decay=0.1)
CONFIGURATIONS = {  # (dtype, optimizer, options)
    "adamw, parameters": (
        torch.float64,
        lambda p: torch.optim.AdamW(p, **ADAMW),
        dict(warmup_steps=7, final_steps=9, allocation_interval=4, budget_unit="parameters"),
    ),
    "adamw amsgrad, no final phase": (
        torch.float32,
        lambda p: torch.optim.AdamW(p, amsgrad=True, **ADAMW),
        dict(warmup_steps=0, final_steps=0),
    ),
    "adamw fused, min_rank": (
        torch.float32,
        lambda p: torch.optim.AdamW(p, fused=True, **ADAMW),
        dict(warmup_steps=5, final_steps=20, allocation_interval=3, min_rank=1),
    ),
    "sgd, long interval": (
        torch.float64,
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
        dict(warmup_steps=10, final_steps=12, allocation_interval=11),
    ),
    "sgd, target 0": (
        torch.float32,
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
        dict(warmup_steps=3, final_steps=25, target_rank=0),
    ),
    "adamw, masked": (
        torch.float64,
        lambda p: torch.optim.AdamW(p, foreach=True, **ADAMW),
        dict(warmup_steps=7, final_steps=9, shrink=False, beta1=0.5, beta2=0.95),
    ),
}


def build(name: str, seed: int):
    dtype, make, options = CONFIGURATIONS[name]
    model, allocator = network(dtype, dropout=0.2, seed=seed, total_steps=TOTAL, **options)
    optimizer = make(trained(model.train()))
    allocator.attach(optimizer)
    return model, allocator, optimizer


def saved(model, allocator, optimizer) -> bytes:
    file = io.BytesIO()
    torch.save(
        {
            "model": model.state_dict(),
            "allocator": allocator.state_dict(),
            "optimizer": optimizer.state_dict(),
            "random": torch.get_rng_state(),
        },
        file,
    )
    return file.getvalue()


def resumed(name: str, file: bytes):
    state = torch.load(io.BytesIO(file), weights_only=True)
    model, allocator, optimizer = build(name, seed=99)  # other weights: all must come from the file
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    allocator.load_state_dict(state["allocator"])
    torch.set_rng_state(state["random"])
    return model, allocator, optimizer


def facts(allocator) -> list:
    kept = [kept.tolist() for kept in allocator.pattern.values()]
    return [kept, allocator.ranks, allocator.steps, allocator.frozen]


def assert_same_run(got, wanted) -> None:
    """(model, allocator, optimizer) of two finished runs."""
    assert_same_state(got[0].state_dict(), wanted[0].state_dict())
    assert_same_state(got[1].state_dict(), wanted[1].state_dict())
    moments = got[2].state_dict()["state"], wanted[2].state_dict()["state"]
    assert moments[0].keys() == moments[1].keys()
    for i in moments[0]:
        assert_same_state(moments[0][i], moments[1][i])
    for name in ("first", "second", "third"):
        assert got[0].get_submodule(name).rank == wanted[0].get_submodule(name).rank


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_stop_of_a_run(name):
    run = build(name, seed=4)
    files, losses, seen = [saved(*run)], [], [facts(run[1])]
    for step in range(1, TOTAL + 1):
        losses += train(run[0], run[2], [step])
        files.append(saved(*run))
        seen.append(facts(run[1]))
    assert run[1].frozen and sum(run[1].ranks.values()) <= 6 and len(set(losses)) == TOTAL
    for stop in range(TOTAL + 1):  # before the first step, every one, after the last
        again = resumed(name, files[stop])
        assert saved_facts_equal(again, seen[stop]), f"stop {stop}"
        for step in range(stop + 1, TOTAL + 1):
            assert train(again[0], again[2], [step]) == [losses[step - 1]], f"{stop}: {step}"
            assert facts(again[1]) == seen[step], f"{stop}: {step}"
        assert_same_run(again, run)


def saved_facts_equal(run, wanted) -> bool:
    return facts(run[1]) == wanted


@pytest.mark.parametrize("stop", [1, 6, 20, 41, 50])
def test_a_state_is_a_copy_and_survives_a_round_trip(stop):
    name = "adamw, parameters"
    model, allocator, optimizer = build(name, seed=4)
    train(model, optimizer, range(1, stop + 1))
    state = allocator.state_dict()
    assert_same_state(resumed(name, saved(model, allocator, optimizer))[1].state_dict(), state)
    kept = {key: value.clone() for key, value in state.items()}
    other = build(name, seed=4)[1]
    other.load_state_dict(state)
    train(model, optimizer, range(stop + 1, stop + 3))
    assert_same_state(state, kept)  # not written by later steps, nor by those of who loaded it
    for value in state.values():
        value.zero_()
    assert_same_state(other.state_dict(), kept)


def test_skipped_steps_and_history_are_kept():
    name = "adamw, parameters"
    model, allocator, optimizer = build(name, seed=4)
    train(model, optimizer, range(1, 20))
    model.first.lora_E.grad[0] = float("inf")
    allocator.step(optimizer)
    again = resumed(name, saved(model, allocator, optimizer))[1]
    assert again.skipped_steps == 1 and again.steps == 19
    entries = [[(h.step, h.budget, h.ranks) for h in a.history] for a in (allocator, again)]
    assert entries[0] == entries[1] and len(entries[0]) >= 3


def test_going_back_before_the_freeze_gives_the_directions_back():
    """Into the same live model, whose layers were shrunk since."""
    name = "sgd, long interval"
    run = build(name, seed=4)
    train(run[0], run[2], range(1, 31))
    file = saved(*run)
    state = torch.load(io.BytesIO(file), weights_only=True)
    losses = train(run[0], run[2], range(31, TOTAL + 1))
    ends = {key: value.clone() for key, value in run[0].state_dict().items()}
    assert run[0].first.rank + run[0].second.rank + run[0].third.rank == 6
    run[0].load_state_dict(state["model"])
    run[2].load_state_dict(state["optimizer"])
    run[1].load_state_dict(state["allocator"])
    torch.set_rng_state(state["random"])
    assert [run[0].get_submodule(x).rank for x in ("first", "second", "third")] == [6, 6, 6]
    assert train(run[0], run[2], range(31, TOTAL + 1)) == losses
    assert_same_state(run[0].state_dict(), ends)
