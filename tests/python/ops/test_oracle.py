# The oracle against what is published (Random123's known answers) and against finite differences.
from dataclasses import replace

import numpy as np
import oracle
import pytest

# Random123, tests/kat_vectors, lines "philox4x32 7": counter, key, words.
KNOWN_ANSWERS = """
00000000 00000000 00000000 00000000  00000000 00000000  5f6fb709 0d893f64 4f121f81 4f730a48
ffffffff ffffffff ffffffff ffffffff  ffffffff ffffffff  5207ddc2 45165e59 4d8ee751 8c52f662
243f6a88 85a308d3 13198a2e 03707344  a4093822 299f31d0  4dfccaba 190a87f0 c47362ba b6b5242a
"""


@pytest.mark.parametrize("line", KNOWN_ANSWERS.strip().splitlines(), ids=["zeros", "ones", "pi"])
def test_philox_gives_the_known_answers(line):
    words = [int(word, 16) for word in line.split()]
    got = oracle.philox4x32(np.array([words[:4]], dtype=np.uint64), tuple(words[4:6]))
    assert got[0].tolist() == words[6:]


def test_mask_uses_halves_in_order_and_drops_below_the_threshold():
    halves = [0xB709, 0x5F6F, 0x3F64, 0x0D89, 0x1F81, 0x4F12, 0x0A48, 0x4F73]  # seed 0, block 0
    for number in halves:
        p = (number + 1) / 65536
        expected = [float(half > number) for half in halves]
        assert oracle.dropout_mask(0, 1, 8, p)[0].tolist() == expected


def test_thresholds_round_ties_to_even():
    assert [oracle.dropout_threshold(k / 2 / 65536) for k in range(6)] == [0, 0, 1, 2, 2, 2]
    assert oracle.dropout_threshold(1.0) == 65536
    assert oracle.dropout_keep_scale(1.0) == 0.0


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("rank", [0, 2, 4])
def test_gradients_match_central_differences(gated, rank):
    random = np.random.default_rng(7)
    shapes = {"x": (2, 3, 5), "weight": (6, 5), "bias": (6,), "A": (4, 5), "B": (6, 4)}
    arrays = {name: random.standard_normal(shape) for name, shape in shapes.items()}
    arrays["gate"] = random.standard_normal((4, 1)) if gated else None
    factor = oracle.dropout_mask(3, 6, 5, 0.3) * oracle.dropout_keep_scale(0.3)
    problem = oracle.Problem(**arrays, scaling=0.7, rank=rank, factor=factor)
    dy = random.standard_normal((2, 3, 6))
    found = oracle.gradients(problem, dy)
    fields = {"x": "x", "W": "weight", "b": "bias", "A": "A", "B": "B"} | (
        {"E": "gate"} if gated else {}
    )
    for key, field in fields.items():
        value = getattr(problem, field)
        expected = np.zeros_like(value)
        for index in np.ndindex(*value.shape):
            step = np.zeros_like(value)
            step[index] = 0.5  # the formula is linear in each argument, so any step is exact
            ahead = oracle.forward(replace(problem, **{field: value + step}))
            behind = oracle.forward(replace(problem, **{field: value - step}))
            expected[index] = ((ahead - behind) * dy).sum()
        np.testing.assert_allclose(found[key], expected, rtol=0, atol=1e-12, err_msg=key)
