# Nested plain values through JSON come back equal, of the same types and bits; others are named.
import enum
import json
from collections import Counter, OrderedDict, defaultdict, namedtuple

import pytest
import torch
from checkpoint_trainings import same
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.plain_values import copied, from_json, to_json

KEYS = st.one_of(st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.none())
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.one_of(
        st.lists(inner), st.lists(inner).map(tuple), st.dictionaries(KEYS, inner)
    ),
    max_leaves=12,
)


def through_json(value):
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(to_json(value, "", tensors), allow_nan=False)
    return from_json(json.loads(text), tensors)


@settings(max_examples=40)
@given(VALUES)
def test_values_come_back(value):
    assert same(through_json(value), value)
    assert same(copied(value), value)


@pytest.mark.parametrize("number", [0.1, -0.0, 5e-324, 1.7976931348623157e308, 2**70, 1e-3, 3.0])
def test_numbers_are_exact(number):
    got = through_json(number)
    assert type(got) is type(number) and repr(got) == repr(number)


def test_mappings_keep_kind_and_order():
    counted = Counter({30: 2, 10: 1})
    ordered = OrderedDict([("b", 1), ("a", (float("inf"), [None]))])
    got = through_json({"milestones": counted, 0: ordered, "0": "text", "tensor": "no tensor"})
    assert type(got["milestones"]) is Counter and list(got["milestones"].elements()) == [30, 30, 10]
    assert type(got[0]) is OrderedDict and list(got[0]) == ["b", "a"]
    assert got["0"] == "text" and got["tensor"] == "no tensor"


def test_tensors_of_one_path_stay_apart():
    value = {"a": {"b": torch.ones(1)}, "a.b": torch.zeros(2), 1: torch.ones(3), "1": torch.ones(4)}
    assert same(through_json(value), value)


def test_a_copy_shares_nothing():
    value = {"a": [torch.zeros(2)], "b": (torch.zeros(1, requires_grad=True),)}
    other = copied(value)
    value["a"][0].fill_(1)
    value["a"].append(1)
    assert other["a"][0].tolist() == [0, 0] and len(other["a"]) == 1


Pair = namedtuple("Pair", "a b")
Kind = enum.IntEnum("Kind", "one two")


@pytest.mark.parametrize(
    "value", [print, {1}, b"x", Pair(1, 2), Kind.one, defaultdict(int), 1j, torch.float32, object()]
)
def test_what_is_not_plain_is_named(value):
    name = type(value).__qualname__
    with pytest.raises(TypeError, match=rf"state\.0\.slow must be a tensor, .* got .*{name}"):
        to_json({"state": {0: {"slow": value}}}, "", {})


@pytest.mark.parametrize("key", [(1, 2), torch.ones(1), print])
def test_keys_that_are_not_plain_are_named(key):
    with pytest.raises(TypeError, match="state must have numbers or strings as keys, got"):
        to_json({"state": {key: 1}}, "", {})


@pytest.mark.parametrize(
    "json", [{}, {"set": [1]}, {"tensor": "gone"}, {"float": 1, "tuple": []}, {"dict": [[1]]}]
)
def test_other_json_is_refused(json):
    with pytest.raises((ValueError, KeyError)):
        from_json(json, {})
