# How the state machines run: the same sequences every time, and no warning that is not known.
from __future__ import annotations

import warnings

from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test


def run_machine(machine: type[RuleBasedStateMachine], steps: int, known: tuple[str, ...] = ()):
    """40 random sequences of at most `steps` rules; `known`: beginnings of warnings let through."""
    bounded = settings(
        max_examples=40,
        stateful_step_count=steps,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for message in known:
            warnings.filterwarnings("ignore", message=message)
        run_state_machine_as_test(machine, settings=bounded)
