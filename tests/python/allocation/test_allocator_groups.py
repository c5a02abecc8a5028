# Processes whose allocators decide alike, or all raise before anything is written.
import copy
import os
from datetime import timedelta

import pytest
import torch.distributed as dist
from allocation_models import batch
from group_models import INTERVAL, KINDS, Training, made
from process_cases import failures_of
from processes import run_processes
from tolerances import assert_same_bits

FIRST = {"AdaLoRA": "first", "spectral": "0"}
LAST = {"AdaLoRA": "third", "spectral": "2"}


def _message(training: Training, step: int, change, steps: int = 60) -> str:
    """Trains with equal gradients, but for change(model) in one step, until all must raise."""
    for i in range(steps):
        try:
            training.step(*batch(i), change if i == step else None)
        except RuntimeError as error:
            for name, value in training.state().items():
                assert_same_bits(value, training.before[name], name)
            return str(error)
    return ""


def _added(name: str, by: float, who: int):
    def change(model) -> None:
        if dist.get_rank() == who:
            gradient = model.get_submodule(name).lora_A.grad
            gradient.view(-1)[0] += by

    return change


def _differ(rank: int) -> None:
    for kind in KINDS:
        # Later gradients differ in all layers, so that the last is first where none follow.
        for layer, steps in ((FIRST[kind], (0, INTERVAL)), (LAST[kind], (2 * INTERVAL - 1,))):
            for step in steps:
                message = _message(Training(kind), step, _added(layer, 1e-3, who=1))
                told = (step // INTERVAL + 1) * INTERVAL
                wanted = f"decide alike at step {told}: process 1 differs, first in '{layer}'"
                assert wanted in message, (kind, step, message)


def test_an_injected_difference_is_named_and_nothing_is_written(failures):
    assert failures["_differ"] == ""


def _not_finite(rank: int) -> None:
    for kind in KINDS:
        for step in (0, INTERVAL - 1, INTERVAL):
            message = _message(Training(kind), step, _added(LAST[kind], float("nan"), who=0))
            assert "skipped for gradients that are infinite or NaN, differ" in message, (kind, step)
            assert message.partition(", process 1: ")[2].partition(")")[0].endswith(" and 0")


def test_nan_in_one_process_that_nothing_averages_is_reported(failures):
    assert failures["_not_finite"] == ""


def _raises(rank: int) -> None:
    training = Training("spectral", rule=_rule)
    message = _message(training, -1, None)
    assert message == "of the rule" if rank == 1 else "process 1 could not take it" in message
    training = Training("AdaLoRA")
    message = _message(training, INTERVAL - 1, _clears if rank == 1 else None)
    assert ("has a gradient" if rank == 1 else "process 1 could not take it") in message


def _rule(question) -> list[int]:
    if dist.get_rank() == 1 and question.step == 2 * INTERVAL:
        raise RuntimeError("of the rule")
    return question.ranks


def _clears(model) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def test_an_error_in_one_process_ends_the_step_of_all(failures):
    assert failures["_raises"] == ""


def _resumes(rank: int) -> None:
    for kind in KINDS:
        training, states = Training(kind), []
        for i in range(2 * INTERVAL):
            training.step(*batch(i))
            states.append(training.allocator.state_dict())
        training.allocator.load_state_dict(states[-1])
        training.step(*batch(i + 1))
        training.allocator.load_state_dict(states[-1 - rank])
        with pytest.raises(RuntimeError, match=r"process 0: 9 and 0, process 1: 8 and 0"):
            training.step(*batch(i + 2))


def test_states_of_other_steps_are_reported_at_the_next(failures):
    assert failures["_resumes"] == ""


def _dies(rank: int) -> None:
    training = Training("AdaLoRA")
    for i in range(INTERVAL - 1):
        training.step(*batch(i))
    if rank == 1:
        os._exit(0)  # as if killed: it closes nothing
    with pytest.raises(RuntimeError, match="could not compare what they decided: one has ended"):
        training.step(*batch(INTERVAL - 1))
    os._exit(0)  # the group is no more


def test_a_process_that_dies_ends_the_others():
    run_processes(_dies, 2)


def _comes_late(rank: int) -> None:
    store = dist.distributed_c10d._get_default_store()
    training = Training("AdaLoRA")
    for i in range(2 * INTERVAL):
        if rank == 1:  # not before the other is about to wait
            store.wait([f"step {i}"])
        store.set(f"step {i}", "now")
        training.step(*batch(i))
    assert training.allocator.steps == 2 * INTERVAL


def test_a_late_process_delays_the_others(failures):
    assert failures["_comes_late"] == ""


def _never_comes(rank: int) -> None:
    group = dist.new_group()
    dist.barrier(group)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), group)
    training = Training("AdaLoRA", group=group)
    if rank == 0:
        with pytest.raises(RuntimeError, match="did not come within the group's timeout"):
            training.step(*batch(0))
        assert training.allocator.steps == 0
    dist.barrier()


def test_a_process_that_never_comes_is_an_error_after_the_timeout(failures):
    assert failures["_never_comes"] == ""


def _groups(rank: int) -> None:
    both, alone = dist.new_group([0, 1]), dist.new_group([2])
    mine, other = (both, alone) if rank < 2 else (alone, both)
    for kind in KINDS:  # of its own in the third, and of its own in each process
        for group, scale in ((mine, 1 + rank // 2), (None, 1 + rank)):
            training = Training(kind, group=group)
            for i in range(40):
                x, y = batch(i)
                training.step(x * scale, y)
            assert training.allocator.frozen
    if rank == 0:  # a copy of one on its own is on its own
        model, twin = copy.deepcopy((training.model, training.allocator))
        twin.step(None)
    message = _message(Training("AdaLoRA", group=mine), 2, _added("second", 1e-3, who=1))
    assert (": process 1 differs" in message) == (rank < 2), message
    with pytest.raises(TypeError, match='RankAllocator: group must be .* "default" or None, got 3'):
        made("AdaLoRA", group=3)
    with pytest.raises(TypeError, match="that this process is in"):
        made("AdaLoRA", group=other)


def test_groups_of_some_processes_and_none(failures):
    assert failures["_groups"] == ""


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> dict[str, str]:
    cases = [_differ, _not_finite, _raises, _resumes, _comes_late, _groups, _never_comes]
    return failures_of(cases, 3, tmp_path_factory.mktemp("cases"))


def test_one_process_needs_no_group():
    training = Training("AdaLoRA")
    training.step(*batch(0))
    with pytest.raises(TypeError, match="SpectralAllocator: group must be"):
        made("spectral", group="all")
