# load_state_dict refuses a state that is not this allocator's, lists why and changes nothing.
import re

import pytest
import torch
from allocation_models import assert_same_state, bench, normal

import rankwise as rw

BASE = dict(
    initial_rank=4, target_rank=2, total_steps=12, warmup_steps=2, final_steps=3,
    allocation_interval=2, beta1=0.85, beta2=0.85, min_rank=0, shrink=True,
)  # fmt: skip
SHAPES = [(3, 4), (5, 2)]
OTHER = {  # option: (another value, the line's name)
    "target_rank": (1, "options.final_budget"),
    "total_steps": (13, "options.total_steps"),
    "warmup_steps": (1, "options.warmup_steps"),
    "final_steps": (2, "options.final_steps"),
    "allocation_interval": (3, "options.allocation_interval"),
    "beta1": (0.9, "options.beta1"),
    "beta2": (0.9, "options.beta2"),
    "min_rank": (1, "options.min_rank"),
    "shrink": (False, "options.shrink"),
    "budget_unit": ("parameters", "options.initial_budget"),
}


def run(steps: int, shapes=SHAPES, ranks=(4, 3), dtypes=torch.float64, **options):
    b, random = bench(shapes, ranks, dtypes, **{**BASE, **options}), normal(8)
    for _ in range(steps):
        b.fill(random, gradients=False)
        b.fill(random, gradients=True)
        b.allocator.step(None)
    return b


def refused(b, state) -> str:
    """The error's text, after a check that nothing was changed."""
    before, ranks = b.allocator.state_dict(), [layer.rank for layer in b.layers]
    weights = {k: v.clone() for k, v in b.model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        b.allocator.load_state_dict(state)
    assert_same_state(b.allocator.state_dict(), before)
    assert_same_state(b.model.state_dict(), weights)
    assert [layer.rank for layer in b.layers] == ranks
    assert len(b.allocator.history) == len(before["history.steps"])
    assert str(error.value).startswith("RankAllocator: ")
    return str(error.value)


@pytest.mark.parametrize("steps", [0, 5, 10])
@pytest.mark.parametrize("option", OTHER)
def test_other_options(option, steps):
    value, name = OTHER[option]
    text = refused(run(steps), run(7, **{option: value}).allocator.state_dict())
    (line,) = re.findall(rf"^  {re.escape(name)}: .*$", text, re.MULTILINE)
    wanted, got = re.search(r"must be (\S+), got (\S+)$", line).groups()
    assert wanted != got
    if option != "budget_unit":
        assert len(text.splitlines()) == 2


def test_all_that_differs_is_listed():
    other = run(4, total_steps=20, beta1=0.5, min_rank=1).allocator.state_dict()
    text = refused(run(3), other)
    for name in ("total_steps", "beta1", "min_rank"):
        assert f"options.{name}: must be" in text
    assert len(text.splitlines()) == 4


@pytest.mark.parametrize("option, values", [
    ("total_steps", (12_345_678, 12_345_679)),
    ("beta1", (0.85, 0.8500000000000001)),
])  # fmt: skip
def test_numbers_are_written_so_that_they_differ(option, values):
    a, b = (run(1, **{option: value}) for value in values)
    text = refused(a, b.allocator.state_dict())
    wanted, got = re.search(r"must be (\S+), got (\S+)$", text).groups()
    assert wanted != got and float(wanted) == values[0] and float(got) == values[1]


@pytest.mark.parametrize("steps", [4, 10], ids=["before the freeze", "frozen"])
def test_other_adapters(steps):
    more = run(steps, [*SHAPES, (2, 2)], (4, 3, 1)).allocator.state_dict()
    text = refused(run(4), more)
    assert "2.kept: not expected" in text and "history.ranks: must be" in text
    fewer = refused(run(4, [*SHAPES, (2, 2)], (4, 3, 1)), run(steps).allocator.state_dict())
    assert "2.kept: missing" in fewer
    rank = refused(run(4), run(steps, ranks=(4, 2)).allocator.state_dict())
    assert re.search(r"1\.kept: must be Bool \[3\], got Bool \[2\]", rank)


def test_other_sizes_and_dtypes():
    text = refused(run(4), run(4, [(3, 4), (6, 2)]).allocator.state_dict())
    assert re.search(r"1\.lora_A\.sensitivity: must be Double \[3, 5\], got Double \[3, 6\]", text)
    assert "1.lora_A.uncertainty" in text and "1.lora_B" not in text and "0.lora" not in text
    text = refused(run(4), run(4, dtypes=torch.float32).allocator.state_dict())
    assert re.search(r"0\.lora_E\.sensitivity: must be Double \[4, 1\], got Float \[4, 1\]", text)


def test_other_names():
    layers = {"a": torch.nn.Linear(3, 4), "b": torch.nn.Linear(5, 2)}
    options = {**BASE, "rank_pattern": {"b": 3}, "target_modules": ["a", "b"]}
    config = rw.AdaLoRAConfig(**options)
    model = rw.apply_lora(torch.nn.ModuleDict(layers).double(), config)
    text = refused(run(4), rw.RankAllocator(model, config).state_dict())
    assert "0.kept: missing" in text and "a.kept: not expected" in text


KEYS = sorted(run(4).allocator.state_dict())


@pytest.mark.parametrize("key", KEYS)
def test_every_entry_is_needed_and_its_shape_and_dtype_checked(key):
    b, state = run(3), run(4).allocator.state_dict()
    missing = {k: v for k, v in state.items() if k != key}
    assert f"{key}: missing" in refused(b, missing)
    assert f"{key}: must be" in refused(b, state | {key: torch.zeros(2, 3, 4)})
    assert f"{key}: must be" in refused(b, state | {key: state[key].to(torch.complex64)})
    assert "extra: not expected" in refused(b, state | {"extra": torch.zeros(1)})
    b.allocator.load_state_dict(state)
    assert_same_state(b.allocator.state_dict(), state)


def test_a_frozen_state_has_no_averages_and_another_needs_them():
    frozen, early = run(10).allocator.state_dict(), run(4).allocator.state_dict()
    assert not any("lora_" in key for key in frozen) and any("lora_" in key for key in early)
    averages = {k: v for k, v in early.items() if "lora_" in k}
    assert "0.lora_A.sensitivity: not expected" in refused(run(4), frozen | averages)
    b = run(4)
    b.allocator.load_state_dict(frozen)
    assert b.allocator.frozen and b.allocator.scores is None
    assert [layer.rank for layer in b.layers] == list(b.allocator.ranks.values())


@pytest.mark.parametrize("key, value, wanted", [
    ("steps", -2, "from -1 to"),
    ("steps", 2**62, "from -1 to"),
    ("skipped_steps", -(2**63), "from 0 to"),
    ("frozen", 2, "from 0 to 1"),
    ("frozen", -1, "from 0 to 1"),
    ("shrunk", 1, "from 0 to 0"),
])  # fmt: skip
def test_numbers_that_no_training_comes_to(key, value, wanted):
    state = run(4).allocator.state_dict()
    text = refused(run(3), state | {key: torch.tensor(value)})
    assert re.search(rf"^  {key}: must be {wanted}.*, got {value}$", text, re.MULTILINE)
