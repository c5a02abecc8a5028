# One test per refusal of AdaLoRA's passes: nothing that does not fit is read or written.
import re

import pytest
import torch

OPS = torch.ops.rankwise
PROGRESS = "progress must be 6 contiguous int64, got "


def zeros(*sizes, dtype=torch.float32):
    return torch.zeros(sizes, dtype=dtype)


def apart(tensor):
    """The same values, not contiguous."""
    return torch.stack([tensor, tensor], -1)[..., 0]


def progress():
    return zeros(6, dtype=torch.int64)


def factors():
    return [zeros(3, 7), zeros(5, 3), zeros(3, 1)]


LISTS = ("parameters", "gradients", "sensitivity", "uncertainty")


def step(**changed):
    lists = {name: factors() for name in LISTS}
    values = lists | {"ranks": [3], "beta1": 0.85, "beta2": 0.8, "score": True}
    return OPS._importance_step_(**values | changed)


def select(**changed):
    values = {
        "kept": zeros(3, dtype=torch.bool),
        "scores": zeros(3, dtype=torch.float64),
        "ranks": [2, 1],
        "costs": [1, 1],
        "min_rank": 0,
        "progress": progress(),
    }
    return OPS._select_triplets_(**values | changed)


def mask(**changed):
    values = {
        "lora_E": [zeros(2, 1), zeros(1, 1)],
        "ranks": [2, 1],
        "kept": zeros(3, dtype=torch.bool),
        "progress": progress(),
    }
    return OPS._mask_triplets_(**values | changed)


def record(**changed):
    values = {
        "choices": zeros(5, 4, dtype=torch.int64),
        "summaries": zeros(5, 4, dtype=torch.float64),
        "progress": progress(),
        "scores": zeros(3, dtype=torch.float64),
        "kept": zeros(3, dtype=torch.bool),
        "ranks": [2, 1],
        "freeze_step": 9,
    }
    return OPS._record_choice_(**values | changed)


def schedule(**changed):
    values = {
        "progress": progress(),
        "found": None,
        "found_inf": None,
        "budgets": zeros(1, dtype=torch.int64),
        "freeze_step": 9,
    }
    return OPS._schedule_step(**values | changed)


def refuses(message, op, **changed):
    op()  # what is not changed fits
    with pytest.raises(RuntimeError, match=re.escape(message)):
        op(**changed)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(
    "name, named",
    [
        ("parameters", ""),
        ("gradients", "a gradient"),
        ("sensitivity", "sensitivity"),
        ("uncertainty", "uncertainty"),
    ],
)
def test_a_list_of_a_step(name, named, place):
    sizes = list(factors()[place].shape)
    for wrong in (zeros(sizes[0] + 1, sizes[1]), zeros(*sizes, dtype=torch.float64)):
        values = factors()
        values[place] = wrong
        refuses(f"importance: {named}", step, **{name: values})
    for shorter in (factors()[:place], factors() + factors()):
        refuses("there must be 3 parameters, gradients and", step, **{name: shorter})


@pytest.mark.parametrize("name", LISTS)
def test_a_list_of_a_step_with_one_apart(name):
    values = [apart(factors()[0]), *factors()[1:]]
    wanted = "must be contiguous [3, 7] of Float on cpu, got [3, 7] of Float on cpu, not contiguous"
    refuses(wanted, step, **{name: values})


def test_ranks():
    for wrong in ([-1], [4]):
        refuses("importance: a rank must be from 0 to 3, got", step, ranks=wrong)
    for op in (select, mask, record):
        refuses("ranks must be at least 0, got [4, -1]", op, ranks=[4, -1])


def test_the_rank_of_a_later_adapter():
    smaller = [zeros(2, 4), zeros(6, 2), zeros(2, 1)]
    two = {name: factors() + smaller for name in LISTS}
    step(**two, ranks=[3, 2])
    with pytest.raises(RuntimeError, match="a rank must be from 0 to 2, got 3"):
        step(**two, ranks=[3, 3])


def test_averages_of_half_precision_are_float32():
    halves = [factor.half() for factor in factors()]
    step(parameters=halves, gradients=halves)
    refuses("of Float", step, parameters=halves, gradients=halves, sensitivity=halves)


def test_a_gradient_that_is_checked():
    OPS._importance_check([zeros(3, 7)])
    with pytest.raises(RuntimeError, match="a gradient must be contiguous"):
        OPS._importance_check([zeros(3, 7), apart(zeros(3, 7))])


@pytest.mark.parametrize("op", [step, select, mask, record, schedule])
@pytest.mark.parametrize(
    "wrong", [zeros(6), zeros(5, dtype=torch.int64), zeros(7, dtype=torch.int64), apart(progress())]
)
def test_progress(op, wrong):
    refuses(PROGRESS, op, progress=wrong)


@pytest.mark.parametrize(
    "wrong", [zeros(1), zeros(0, dtype=torch.int64), apart(zeros(2, dtype=torch.int64))]
)
def test_budgets(wrong):
    refuses("budgets must be contiguous int64, at least one", schedule, budgets=wrong)


@pytest.mark.parametrize(
    "op, name, dtype",
    [
        (select, "scores", torch.float64),
        (select, "kept", torch.bool),
        (mask, "kept", torch.bool),
        (record, "scores", torch.float64),
        (record, "kept", torch.bool),
    ],
)
def test_one_number_for_each_direction(op, name, dtype):
    good = zeros(3, dtype=dtype)
    for wrong in (good.float(), good[:2], zeros(4, dtype=dtype), good[None], apart(good)):
        refuses(f"{name} must be a contiguous vector of 3", op, **{name: wrong})


@pytest.mark.parametrize("costs", [[1], [1, 1, 1]])
def test_costs(costs):
    refuses("there must be 2 costs", select, costs=costs)


def test_lora_E():
    refuses("there must be 2 tensors, got 1", mask, lora_E=[zeros(3, 1)])
    refuses("there must be 2 tensors, got 3", mask, lora_E=[zeros(2, 1)] * 3)
    for wrong in (zeros(1, 1), zeros(2)):
        refuses("lora_E of rank 2 must be [capacity, 1]", mask, lora_E=[wrong, zeros(1, 1)])


@pytest.mark.parametrize("name, dtype", [("choices", torch.int64), ("summaries", torch.float64)])
def test_a_history(name, dtype):
    good = zeros(5, 4, dtype=dtype)
    for wrong in (good.float(), good[:4], zeros(5, 3, dtype=dtype), good[None], apart(good)):
        refuses(
            "record_choice: choices must be contiguous int64 [rows, 4]", record, **{name: wrong}
        )
