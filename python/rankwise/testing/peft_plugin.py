"""A pytest plugin: PEFT's own test-suite with our layers, and which calls reached our operators.

    pytest -p rankwise.testing.peft_plugin --peft-results ours.jsonl tests/test_custom_models.py

Every tuner that PEFT makes is accelerated. With ``--peft-layers stock`` none is: the run to compare
with. A line of JSON is written for each test: its outcome, the calls of our layers that our
operators computed ("fused"), and the others by the reason why PEFT computed them.

There is no network in either run, so that tests that want a model from the hub fail at once; and
torch is seeded before each test, for many draw weights without a seed. On the CPU our operators use
ATen's products: some of the tests want equal outputs to 1e-8 of torch's.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import sys
from collections import Counter
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from rankwise import ops

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
# What PEFT's tests import for models and data of the hub, where it is not installed.
_OF_THE_HUB = {"datasets": "load_dataset", "diffusers": "StableDiffusionPipeline"}

_calls: Counter[str] = Counter()  # of the test that runs


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rankwise")
    layers = ("rankwise", "stock")
    group.addoption("--peft-layers", choices=layers, default="rankwise", help="whose layers run")
    group.addoption("--peft-results", help="file to which a line is added for each test")


def pytest_configure(config: pytest.Config) -> None:
    _refuse_network()
    for name, attribute in _OF_THE_HUB.items():
        if importlib.util.find_spec(name) is None:
            module = sys.modules[name] = ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)
            setattr(module, attribute, _absent)
    if config.getoption("peft_layers") == "rankwise":
        ops.set_cpu_path("ATen")
        _accelerate_all()


def pytest_runtest_setup(item: pytest.Item) -> None:
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if call.when == "setup":
        _calls.clear()
    path = item.config.getoption("peft_results")
    if path and (call.when == "call" or report.outcome != "passed"):
        line = {"test": item.nodeid, "outcome": report.outcome, "calls": dict(_calls)}
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
    return report


def _absent(*args, **kwargs):
    raise RuntimeError("there is no hub in these tests")  # an OSError would be tried again


def _refuse_network() -> None:
    connect = socket.socket.connect

    def here_alone(self, address):
        outside = isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost")
        if outside:
            _absent()
        return connect(self, address)

    socket.socket.connect = here_alone
    socket.getaddrinfo = _absent


def _accelerate_all() -> None:
    """Every tuner, wherever it is made, and the count of all calls of our layers."""
    from rankwise.integrations.peft import accelerate
    from rankwise.integrations.peft.decision import Calls
    from rankwise.integrations.peft.tuners import TUNERS

    for tuner_class in TUNERS:

        def made(self, *args, _own=tuner_class, _init=tuner_class.__init__, **kwargs):
            _init(self, *args, **kwargs)
            if type(self) is _own:
                accelerate(self)

        tuner_class.__init__ = made

    note = Calls.note

    def noted(self, reason: str | None) -> None:
        note(self, reason)
        _calls["fused" if reason is None else reason] += 1

    Calls.note = noted
