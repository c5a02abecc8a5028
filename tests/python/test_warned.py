"""Warnings point at the program's line, whatever calls the package in between."""

import contextlib
import linecache

import pytest
import torch
from torch import nn

from rankwise.nn import LoRALinear
from rankwise.warned import warn

BETWEEN = """
class Warns(nn.Module):
    def forward(self, x):
        warn("from a module")
        return x

@contextlib.contextmanager
def warning_at_the_end():
    yield
    warn("from a context manager")
"""


def test_the_line_is_the_programs():
    between = {"__name__": "transformers.any", "nn": nn, "warn": warn, "contextlib": contextlib}
    exec(BETWEEN, between)
    layer = LoRALinear(4, 4, rank=2)
    with pytest.warns(UserWarning) as caught:
        layer.merge()
        layer.merge()  # here
        nn.Sequential(between["Warns"]())(torch.ones(1))  # here
        with between["warning_at_the_end"]():  # here
            pass
    lines = [linecache.getline(warning.filename, warning.lineno) for warning in caught]
    assert len(lines) == 3 and all("# here" in line for line in lines), lines
