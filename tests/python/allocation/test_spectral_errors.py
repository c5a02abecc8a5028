# What a SpectralAllocator refuses: options, models and rules.
import pytest
import torch
from spectral_models import Planted, config, spectral, train, trained

import rankwise as rw


def test_what_it_needs():
    with pytest.raises(ValueError, match="no active LoRA adapter"):
        rw.SpectralAllocator(Planted(), config())
    with pytest.raises(TypeError, match="must be a SpectralConfig, got LoRAConfig"):
        rw.SpectralAllocator(Planted(), rw.LoRAConfig(target_modules=["wide"]))
    model = rw.apply_lora(Planted(), config())
    with pytest.raises(ValueError, match="must be at least 74, what min_rank 1 needs, got 73"):
        rw.SpectralAllocator(model, config(final_budget=73))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(allocation_interval=0), "allocation_interval must be at least 1, got 0"),
        (dict(final_steps=70), "must be less than total_steps 60"),
        (dict(min_rank=4), "min_rank must be at most 3, got 4"),
        (dict(max_rank=2), "max_rank must be at least 3, got 2"),
        (dict(initial_rank=-1), "initial_rank must be at least 0, got -1"),
        (dict(initial_rank=2.5), "initial_rank must be an integer, got 2.5"),
        (dict(score="size"), "score must be one of .*, got 'size'"),
        (dict(rule="elalora"), "rule must be a function or None, got 'elalora'"),
        (dict(min_age=0.5), "min_age must be an integer or None, got 0.5"),
        (dict(beta=1.0), r"beta must be in \[0, 1\), got 1"),
        (dict(hysteresis=-0.1), r"hysteresis must be in \[0, 1\)"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda q: [3, 3], "must be 3, got 2"),
        (lambda q: [9, 3, 3], "must be from 1 to 6 for 'narrow', got 9"),
        (lambda q: [6, 6, 6], "must cost at most the budget 222, got 444"),
    ],
)
def test_ranks_of_a_rule_that_cannot_be(rule, message):
    model, allocator = spectral(rule=rule, allocation_interval=1, warmup_steps=0)
    optimizer = torch.optim.AdamW(trained(model), 0.02)
    allocator.attach(optimizer)
    with pytest.raises(ValueError, match=message):
        train(model, optimizer, [0])
    assert set(allocator.ranks.values()) == {3}


def test_an_error_of_a_rule_arrives():
    def failing(question):
        raise KeyError("mine")

    model, allocator = spectral(rule=failing, allocation_interval=1, warmup_steps=0)
    optimizer = torch.optim.AdamW(trained(model), 0.02)
    allocator.attach(optimizer)
    with pytest.raises(KeyError, match="mine"):
        train(model, optimizer, [0])


@pytest.mark.parametrize("key, value, wanted", [
    ("steps", torch.tensor(-1), "from 0 to .*, got -1"),
    ("budget", torch.tensor(2**62), f"from 0 to .*, got {2**62}"),
    ("wide.probes", torch.tensor(100), "from 0 to .*, got 100"),
    ("wide.probes", torch.tensor(-1), "from 0 to .*, got -1"),
    ("wide.columns", torch.full((3, 2), -7), "from 0 to .*, got -7"),
    ("wide.sensitivity", torch.tensor([1.0, torch.nan, 1.0]).double(), "finite, got nan"),
    ("wide.sensitivity", torch.full((3,), -torch.inf).double(), "finite, got -inf"),
    ("wide.young_A", "more than columns", r"Float \[3, .*, got Float \[9, "),
    ("wide.young_B", "less than young_A", r"Float \[.*, 1\], got Float \[.*, 0\]"),
])  # fmt: skip
def test_numbers_of_a_state_that_no_training_comes_to(key, value, wanted):
    _, allocator = spectral()
    state = allocator.state_dict()
    A, B = state["wide.young_A"], state["wide.young_B"]
    if key == "wide.young_A":
        state |= {key: A.new_zeros(9, A.shape[1]), "wide.young_B": B.new_zeros(B.shape[0], 9)}
    elif key == "wide.young_B":
        state |= {"wide.young_A": A.new_zeros(1, A.shape[1])}
    else:
        state |= {key: value}
    before = allocator.state_dict()
    with pytest.raises(ValueError, match=f"  {key}: must be {wanted}"):
        allocator.load_state_dict(state)
    after = allocator.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if ".former" not in name)
