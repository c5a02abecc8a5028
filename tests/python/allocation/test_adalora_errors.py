# Every refusal of AdaLoRAConfig and RankAllocator: the option, what was wanted and what came.
import re

import pytest
import torch
from allocation_models import network
from torch import nn

import rankwise as rw
from rankwise._library import library

GOOD = dict(target_modules=["0"], initial_rank=8, target_rank=4, total_steps=100)
NAN, INF = float("nan"), float("inf")
VALUES = [  # (options, the message)
    (dict(initial_rank=0), "initial_rank must be at least 1, got 0"),
    (dict(initial_rank=-3), "initial_rank must be at least 1, got -3"),
    (dict(target_rank=-1), "target_rank must be from 0 to initial_rank 8"),
    (dict(target_rank=-1), "got -1"),
    (dict(target_rank=9), "target_rank must be from 0 to initial_rank 8 (ranks are pruned, "),
    (dict(target_rank=9), "got 9"),
    (dict(total_steps=0), "total_steps must be the optimizer steps of the whole training, got 0"),
    (dict(total_steps=-5), "total_steps must be the optimizer steps of the whole training, got -5"),
    (dict(warmup_steps=-1), "warmup_steps must be at least 0, got -1"),
    (dict(final_steps=-2), "final_steps must be at least 0, got -2"),
    (dict(warmup_steps=100), "warmup_steps + final_steps must be less than total_steps 100"),
    (dict(final_steps=100), "got 0 + 100"),
    (dict(warmup_steps=60, final_steps=40), "got 60 + 40"),
    (dict(warmup_steps=2**62, final_steps=2**62), "must be less than total_steps 100"),
    (dict(allocation_interval=0), "allocation_interval must be at least 1, got 0"),
    (dict(beta1=1.0), "beta1 must be in [0, 1), got 1"),
    (dict(beta1=-0.1), "beta1 must be in [0, 1), got -0.1"),
    (dict(beta1=NAN), "beta1 must be in [0, 1), got nan"),
    (dict(beta2=1.5), "beta2 must be in [0, 1), got 1.5"),
    (dict(beta2=INF), "beta2 must be in [0, 1), got inf"),
    (dict(min_rank=-1), "min_rank must be from 0 to target_rank 4, got -1"),
    (dict(min_rank=5), "min_rank must be from 0 to target_rank 4, got 5"),
    (dict(budget_unit="bytes"), "budget_unit must be one of ('triplets', 'parameters'), got 'byt"),
    (dict(budget_unit=None), "budget_unit must be one of ('triplets', 'parameters'), got None"),
    (dict(alpha=INF), "alpha must be finite, got inf"),
    (dict(dropout=1.5), "dropout must be in [0, 1], got 1.5"),
    (dict(target_modules=[]), "target_modules must be a list of names"),
]
TYPES = [
    *[
        (dict([(name, value)]), name, value)
        for name in ("initial_rank", "target_rank", "total_steps", "warmup_steps", "final_steps",
                     "allocation_interval", "min_rank")
        for value in (2.5, "3", True)
    ],
    *[(dict([(name, value)]), name, value) for name in ("beta1", "beta2") for value in ("x", None)],
    (dict(shrink="no"), "shrink", "no"),
]  # fmt: skip


@pytest.mark.parametrize("options, message", VALUES, ids=[str(v[0]) for v in VALUES])
def test_values_out_of_range(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        rw.AdaLoRAConfig(**{**GOOD, **options})


@pytest.mark.parametrize("options, name, value", TYPES, ids=[str(t[0]) for t in TYPES])
def test_values_of_another_type(options, name, value):
    """In the same words: which option, what was wanted, what came; not pybind11's signature."""
    with pytest.raises((ValueError, TypeError)) as error:
        rw.AdaLoRAConfig(**{**GOOD, **options})
    text = str(error.value)
    assert re.search(rf"\b{name} must be .*got {re.escape(repr(value))}$", text), text


@pytest.mark.parametrize("name", [k for k in rw.AdaLoRAConfig.__dataclass_fields__])
def test_every_option_of_the_schedule_is_checked_above(name):
    """A new option must come with its errors."""
    elsewhere = {
        "exclude_modules", "rank_pattern", "alpha_pattern", "modules_to_save", "adapter_dtype"
    }  # fmt: skip
    tested = {key for options, *_ in [*VALUES, *TYPES] for key in options}
    assert name in tested | elsewhere


def test_total_steps_has_no_default():
    with pytest.raises(TypeError, match="total_steps"):
        rw.AdaLoRAConfig(target_modules=["0"])


@pytest.mark.parametrize("options", [
    dict(target_rank=8), dict(target_rank=0), dict(warmup_steps=99), dict(final_steps=99),
    dict(warmup_steps=60, final_steps=39), dict(beta1=0.0, beta2=0.0), dict(min_rank=4),
    dict(total_steps=1), dict(allocation_interval=10**12), dict(total_steps=2**62),
], ids=str)  # fmt: skip
def test_the_edges_are_allowed(options):
    rw.AdaLoRAConfig(**{**GOOD, **options})


def adapter(name="a", A=(4, 3), B=(5, 4), E=(4, 1), rank=4):
    return library.Adapter(name, *(torch.zeros(shape) for shape in (A, B, E)), rank)


OPTIONS = rw.AdaLoRAConfig(**GOOD).allocation_options()
SHAPES = "must have lora_A [capacity, in], lora_B [out, capacity] and lora_E [capacity, 1], got "
ADAPTERS = {
    "none": ([], "there must be at least one adapter"),
    "names": ([adapter(), adapter()], "two adapters are called 'a'"),
    "A": ([adapter(A=(3, 3))], f"'a' {SHAPES}[3, 3], [5, 4] and [4, 1]"),
    "B": ([adapter(B=(5, 3))], f"'a' {SHAPES}[4, 3], [5, 3] and [4, 1]"),
    "E": ([adapter(E=(4, 2))], f"'a' {SHAPES}[4, 3], [5, 4] and [4, 2]"),
    "E 1-d": ([adapter(E=(4,))], f"'a' {SHAPES}[4, 3], [5, 4] and [4]"),
    "rank": ([adapter(rank=5)], "the rank of 'a' must be from 0 to its capacity 4, got 5"),
    "negative": ([adapter(rank=-1)], "the rank of 'a' must be from 0 to its capacity 4, got -1"),
    "rank 0": ([adapter(rank=0), adapter("b", rank=0)], "the adapters have rank 0: there is noth"),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters_that_do_not_fit(case):
    adapters, message = ADAPTERS[case]
    with pytest.raises(ValueError, match=re.escape(f"RankAllocator: {message}")):
        library.RankAllocator(adapters, OPTIONS)


def test_factors_must_be_contiguous():
    strided = library.Adapter("a", torch.zeros(3, 4).t(), torch.zeros(5, 4), torch.zeros(4, 1), 4)
    with pytest.raises(ValueError, match="the factors of 'a' must be contiguous"):
        library.RankAllocator([strided], OPTIONS)


def test_a_budget_that_would_grow():
    with pytest.raises(ValueError, match="final budget must be from 0 to the initial budget 3"):
        library.BudgetSchedule(3, 4, OPTIONS)


@pytest.mark.parametrize("model", [
    nn.ModuleList([nn.Linear(3, 3)]),
    rw.apply_lora(nn.ModuleList([nn.Linear(3, 3)]), rw.LoRAConfig(target_modules=["0"])),
], ids=["plain", "LoRA"])  # fmt: skip
def test_a_model_without_adalora_adapters(model):
    with pytest.raises(ValueError, match="no active AdaLoRA adapter; call apply_lora"):
        rw.RankAllocator(model, rw.AdaLoRAConfig(**GOOD))


def test_a_lora_config_is_no_schedule():
    model = rw.apply_lora(nn.ModuleList([nn.Linear(3, 3)]), rw.AdaLoRAConfig(**GOOD))
    with pytest.raises(TypeError, match="RankAllocator: config must be an AdaLoRAConfig, got LoRA"):
        rw.RankAllocator(model, rw.LoRAConfig(target_modules=["0"]))


@pytest.mark.parametrize("wrong", [None, 3, "adam"])
def test_attach_wants_an_optimizer(wrong):
    _, allocator = network()
    message = "attach: optimizer must be a torch.optim.Optimizer, got " + type(wrong).__name__
    with pytest.raises(TypeError, match=re.escape(message)):
        allocator.attach(wrong)


def test_the_penaltys_form():
    _, allocator = network()
    with pytest.raises(ValueError, match=r"form must be in \('squared_sum', .*\), got 'frob'"):
        allocator.orthogonality_penalty("frob")


def test_an_embedding_takes_no_adalora():
    config = rw.AdaLoRAConfig(**GOOD)
    with pytest.raises(ValueError, match="0: an embedding takes no AdaLoRA adapter"):
        rw.apply_lora(nn.ModuleList([nn.Embedding(3, 3)]), config)


def test_repr():
    _, allocator = network(total_steps=4)
    assert repr(allocator) == "RankAllocator(3 adapters, step 0, budget 18 of 18)"
    allocator.freeze(None)
    assert repr(allocator) == "RankAllocator(3 adapters, step 0, frozen)"
