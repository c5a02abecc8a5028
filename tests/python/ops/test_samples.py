# The table itself: large enough, repeatable, and every pair of values of two dimensions occurs.
from itertools import combinations, product

import torch
from samples import DTYPES, FREE, SAMPLES, leaves, subsets, tensors


def test_the_table_is_large_and_has_no_doubles():
    assert len(SAMPLES) >= 250
    assert len({sample.id for sample in SAMPLES}) == len(SAMPLES)


def test_every_gradient_subset_occurs():
    assert {sample.grads for sample in SAMPLES} == set(subsets())


def test_every_pair_of_values_occurs():
    values = {name: set(choices) for name, choices in FREE.items() if name != "grads"}
    values["dtype"] = set(DTYPES)
    for first, second in combinations(values, 2):
        met = {(getattr(s, first), getattr(s, second)) for s in SAMPLES}
        missing = set(product(values[first], values[second])) - met
        assert not missing, f"{first} x {second} lacks {sorted(map(str, missing))}"


def test_data_repeat_and_the_update_is_not_zero():
    for sample in SAMPLES[::17]:
        first, second = leaves(sample), leaves(sample)
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(s.rank[0] == 0 or 0 in s.shape[1:] or tensors(s)["lora_B"].any() for s in SAMPLES)


def test_strides_are_what_they_are_called():
    for s in SAMPLES:
        x, (lead, n_in, n_out) = tensors(s)["input"], s.shape
        assert x.shape == (*lead, n_in)
        if s.stride != "contiguous" and x.numel() > x.shape[-1] > 1:
            assert not x.is_contiguous() or s.stride == "expanded", s.id
        if s.layout == "conv1d" and min(n_in, n_out) > 1:
            assert tensors(s)["weight"].stride() == (1, n_out), s.id
