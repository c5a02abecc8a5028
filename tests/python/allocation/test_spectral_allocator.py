# SpectralAllocator in a training: ranks that rise and fall, what is kept, and what it refuses.
import copy
import pickle
import warnings

import peft
import pytest
import torch
from spectral_models import SHAPES, Planted, config, cost_of, spectral, train, trained

import rankwise as rw

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, 0.02),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 0.02, foreach=True),
    "adam fused amsgrad": lambda p: torch.optim.Adam(p, 0.02, fused=True, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
    "nadam": lambda p: torch.optim.NAdam(p, 0.02),
    "radam": lambda p: torch.optim.RAdam(p, 0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ranks_go_where_they_count(name):
    model, allocator = spectral(total_steps=160, final_steps=60)
    optimizer = OPTIMIZERS[name](trained(model))
    allocator.attach(optimizer)
    budget = cost_of(model)
    losses = train(model, optimizer, range(160))
    assert losses[-1] < 0.5 * losses[0] and allocator.frozen and allocator.steps == 160
    assert allocator.ranks == {layer.name: layer.rank for layer in rw.summary(model).layers}
    assert cost_of(model) + allocator.bank == budget == allocator.budget
    for event in allocator.history:
        costs = (sum(SHAPES[name][:2]) for name in SHAPES)
        spent = sum(rank * cost for rank, cost in zip(event.ranks, costs, strict=True))
        assert spent + event.bank == event.budget == budget
    if name != "sgd":  # whose steps leave weak directions weak
        assert allocator.ranks["wide"] > allocator.ranks["narrow"]
    assert sum(event.added for event in allocator.history) > 0


def test_it_ends_below_a_fixed_rank():
    model, allocator = spectral(total_steps=300, final_steps=100)
    optimizer = torch.optim.AdamW(trained(model), 0.02, weight_decay=0)
    allocator.attach(optimizer)
    moved = sum(train(model, optimizer, range(300))[-20:])
    fixed, _ = spectral()
    fixed_losses = train(fixed, torch.optim.AdamW(trained(fixed), 0.02, weight_decay=0), range(300))
    assert moved < 0.8 * sum(fixed_losses[-20:])


def test_a_falling_budget():
    model, allocator = spectral(final_budget=100)
    optimizer = torch.optim.AdamW(trained(model), 0.02)
    allocator.attach(optimizer)
    train(model, optimizer, range(60))
    assert allocator.budget == 100 == cost_of(model) + allocator.bank
    budgets = [event.budget for event in allocator.history]
    assert budgets == sorted(budgets, reverse=True) and allocator.history[-1].step == 48


def test_a_budget_of_the_users():
    model, allocator = spectral(budget_at=lambda step: 222 + 26 * (step // 8))
    optimizer = torch.optim.AdamW(trained(model), 0.02)
    allocator.attach(optimizer)
    train(model, optimizer, range(60))
    assert allocator.budget == 222 + 26 * 6
    assert cost_of(model) + allocator.bank == allocator.budget


def test_from_rank_0_every_rank_comes_out_of_the_budget():
    options = dict(initial_rank=0, min_rank=0, alpha=2.0, max_rank=5, initial_budget=222)
    model, allocator = spectral(total_steps=160, final_steps=60, **options)
    first = model.loss(0).item()
    assert cost_of(model) == 0 and allocator.bank == 222
    optimizer = torch.optim.AdamW(trained(model), 0.02)
    allocator.attach(optimizer)
    losses = train(model, optimizer, range(160))
    assert losses[0] == first and losses[-1] < 0.3 * first
    assert 0 <= allocator.bank < 22 and cost_of(model) + allocator.bank == 222
    assert allocator.ranks["wide"] > allocator.ranks["narrow"]


def test_a_narrow_layer_begins_with_what_it_can_have():
    model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.Linear(64, 64))
    chosen = config(initial_rank=12, alpha=24.0, target_modules=["0", "1"])
    with pytest.warns(UserWarning, match=r"'0' \(8 in the place of 12\)"):
        rw.apply_lora(model, chosen)
    assert [layer.rank for layer in model] == [8, 12]
    assert [layer.capacity for layer in model] == [8, 24]
    assert [layer.scaling for layer in model] == [2.0, 2.0]


def test_growth_changes_no_output():
    def one_more(question):
        return [min(rank + 1, top) for rank, top in zip(question.ranks, question.highest)]  # noqa: B905

    model, allocator = spectral(rule=one_more, initial_budget=1000, allocation_interval=1)
    optimizer = torch.optim.AdamW(trained(model), 0.02)
    inputs = {name: torch.randn(7, shape[0]) for name, shape in SHAPES.items()}
    for step in range(12):
        train(model, optimizer, [step])
        before = {name: model.get_submodule(name)(x) for name, x in inputs.items()}
        allocator.step(optimizer)
        for name, x in inputs.items():
            assert torch.equal(model.get_submodule(name)(x), before[name]), (step, name)
    assert allocator.ranks == dict.fromkeys(SHAPES, 6)


def test_the_moments_follow_the_directions():
    """In a new basis of the same update an average of gradients is that of the new factors."""
    model, allocator = spectral(rule=lambda q: [2, 2, 2], allocation_interval=1, warmup_steps=0)
    optimizer = torch.optim.SGD(trained(model), lr=0.0, momentum=0.9)
    layer = model.wide
    with torch.no_grad():  # of rank 2, so that dropping the third direction drops nothing
        layer.lora_B[:, :2].normal_()
        layer.lora_B[:, 2] = layer.lora_B[:, 0]
    before = (layer.lora_B @ layer.lora_A).detach()
    for step in range(3):
        train(model, optimizer, [step])
    allocator.step(optimizer)
    assert layer.rank == 2
    torch.testing.assert_close((layer.lora_B @ layer.lora_A).detach(), before)
    moved = {p: optimizer.state[p]["momentum_buffer"].clone() for p in (layer.lora_A, layer.lora_B)}
    again = torch.optim.SGD(trained(model), lr=0.0, momentum=0.9)
    for step in range(3):
        train(model, again, [step])
    for parameter, momentum in moved.items():
        torch.testing.assert_close(
            momentum, again.state[parameter]["momentum_buffer"], rtol=1e-4, atol=1e-5
        )


CONFIGS = {
    "plain": {},
    "ramp": dict(ramp_steps=5, seed=4),
    "literal": dict(score="literal", sensitivity_weight=0.1, threshold=0.01),
    "falling": dict(final_budget=110, hysteresis=0.3, max_moves=2),
    "probes": dict(probes=2, growth="gradient"),
}


@pytest.mark.parametrize("model_first", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_resume_is_bit_equal(name, model_first):
    model, allocator = spectral(**CONFIGS[name])
    optimizer = torch.optim.AdamW(trained(model), 0.02)
    allocator.attach(optimizer)
    saved = {}
    for step in range(60):
        if step % 2 == model_first and step > 0:
            states = (model.state_dict(), optimizer.state_dict(), allocator.state_dict())
            saved[step] = copy.deepcopy(states)
        train(model, optimizer, [step])
    assert len(saved) >= 29
    for step, (of_model, of_optimizer, of_allocator) in saved.items():
        again, resumed = spectral(**CONFIGS[name])
        other = torch.optim.AdamW(trained(again), 0.02)
        resumed.attach(other)
        if model_first:
            again.load_state_dict(of_model)
        resumed.load_state_dict(of_allocator)
        if not model_first:
            again.load_state_dict(of_model)
        other.load_state_dict(of_optimizer)
        train(again, other, range(step, 60))
        assert resumed.ranks == allocator.ranks
        wanted = model.state_dict()
        for key, tensor in again.state_dict().items():
            assert torch.equal(tensor, wanted[key]), (step, key)


def test_a_state_of_other_ranks_without_the_allocators_is_refused():
    model, allocator = spectral()
    optimizer = torch.optim.AdamW(trained(model), 0.02)
    allocator.attach(optimizer)
    early = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(30))
    model.load_state_dict(early)
    with pytest.raises(RuntimeError, match="a state of another step was loaded"):
        train(model, optimizer, [30])


def test_a_new_model_takes_the_state():
    model, allocator = spectral()
    optimizer = torch.optim.AdamW(trained(model), 0.02)
    allocator.attach(optimizer)
    train(model, optimizer, range(60))
    again = rw.apply_lora(Planted(), config())
    again.load_state_dict(model.state_dict())
    assert {layer.name: layer.rank for layer in rw.summary(again).layers} == allocator.ranks
    assert torch.equal(again.loss(5), model.loss(5))


def test_stock_peft_reads_the_folder(tmp_path):
    model, allocator = spectral()
    optimizer = torch.optim.AdamW(trained(model), 0.02)
    allocator.attach(optimizer)
    train(model, optimizer, range(60))
    rw.save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = peft.PeftModel.from_pretrained(Planted(), tmp_path)
    assert abs(stock.base_model.model.loss(3).item() - model.loss(3).item()) < 1e-5
    ours = Planted()
    rw.load_adapter(ours, tmp_path)
    assert {layer.name: layer.rank for layer in rw.summary(ours).layers} == allocator.ranks
    assert abs(ours.loss(3).item() - model.loss(3).item()) < 1e-6


def test_gradients_that_are_not_finite_change_nothing():
    model, allocator = spectral(allocation_interval=1, warmup_steps=0)
    model.loss(0).backward()
    model.wide.lora_A.grad[0, 0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    allocator.step(None)
    assert (allocator.skipped_steps, allocator.steps, allocator.history) == (1, 0, [])
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())


def test_a_scaler_that_leaves_a_step_out():
    model, allocator = spectral()
    optimizer = torch.optim.AdamW(trained(model), 0.02, fused=True)
    allocator.attach(optimizer)
    model.loss(0).backward()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    optimizer.step()
    assert allocator.skipped_steps == 1


@pytest.mark.parametrize("make", [torch.optim.Rprop, torch.optim.Adamax, torch.optim.Adadelta])
def test_an_optimizer_that_cannot_follow_is_refused_by_name(make):
    model, allocator = spectral(rule=lambda q: [2, 2, 2], allocation_interval=1, warmup_steps=0)
    optimizer = make(trained(model))
    allocator.attach(optimizer)
    with pytest.raises(RuntimeError, match="optimizer's state of 'narrow' cannot follow"):
        train(model, optimizer, [0])
    assert allocator.steps == 0 and set(allocator.ranks.values()) == {3}


def test_copies_and_pickles_have_allocators_of_their_own():
    model, allocator = spectral()
    optimizer = torch.optim.AdamW(trained(model), 0.02)
    allocator.attach(optimizer)
    train(model, optimizer, range(20))
    for copied in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        again, its = copied((model, allocator))
        assert its.ranks == allocator.ranks and its.steps == 20
        own = torch.optim.AdamW(trained(again), 0.02)
        own.load_state_dict(optimizer.state_dict())
        its.attach(own)
        train(again, own, range(20, 30))
        assert its.steps == 30 and allocator.steps == 20


def test_an_average_of_the_model_is_told_of():
    model, allocator = spectral()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.AdamW(trained(model), 0.02)
    allocator.attach(optimizer)
    with pytest.warns(UserWarning, match="Begin the average anew after the last event") as told:
        for step in range(20):
            train(model, optimizer, [step])
            averaged.update_parameters(model)
    assert len(told) == 1


def test_nothing_is_told_where_there_is_no_average(recwarn):
    model, allocator = spectral()
    optimizer = torch.optim.AdamW(trained(model), 0.02)
    allocator.attach(optimizer)
    before = allocator.ranks
    train(model, optimizer, range(20))
    assert allocator.ranks != before and not recwarn.list


def test_one_allocator_for_an_adapter():
    model, allocator = spectral()
    optimizer = torch.optim.AdamW(trained(model), 0.02)
    allocator.attach(optimizer)
    with pytest.raises(RuntimeError, match="attached already"):
        allocator.attach(optimizer)
    train(model, optimizer, range(3))
    with pytest.raises(ValueError, match="SpectralAllocator: 'narrow' has an allocator already"):
        rw.SpectralAllocator(model, config())
    allocator.detach()
    rw.SpectralAllocator(model, config())


def test_plain_lora_can_only_shrink_and_be_shared():
    model = rw.apply_lora(Planted(), rw.LoRAConfig(rank=3, target_modules=list(SHAPES)))
    allocator = rw.SpectralAllocator(model, config())
    optimizer = torch.optim.AdamW(trained(model), 0.02)
    allocator.attach(optimizer)
    train(model, optimizer, range(60))
    assert max(allocator.ranks.values()) <= 3
