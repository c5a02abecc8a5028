# What an allocator's steps tell: callbacks, and the log for TensorBoard.
import copy
import gc
import math
import sys
import weakref

import pytest
import torch
from spectral_models import spectral, train, trained

import rankwise as rw


class Writer:
    """{tag: {step: value}}."""

    def __init__(self):
        self.written, self.closed = {}, False

    def add_scalar(self, tag, value, step):
        self.written.setdefault(tag, {})[step] = value

    def close(self):
        self.closed = True


def adalora(**options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
    config = rw.AdaLoRAConfig(
        **dict(initial_rank=4, target_rank=2, total_steps=8, warmup_steps=2, final_steps=2,
               target_modules=["0", "1"]) | options
    )  # fmt: skip
    allocator = rw.RankAllocator(rw.apply_lora(model, config), config)
    optimizer = torch.optim.SGD(rw.parameter_groups(model, lr=0.1))
    return model, optimizer, allocator


def step(model, optimizer, gradient=1.0):
    optimizer.zero_grad()
    (model(torch.randn(4, 6)).square().mean() * gradient).backward()
    optimizer.step()


def test_callbacks_see_what_each_step_left():
    model, optimizer, allocator = adalora()
    allocator.attach(optimizer)
    seen, second = [], []
    handle = allocator.on_step(lambda a: seen.append((a.steps, a.budget, sum(a.ranks.values()))))
    allocator.on_step(lambda a: second.append(len(seen)))
    for _ in range(6):
        step(model, optimizer)
    wanted = [allocator.schedule.budget(i) for i in range(1, 7)]
    assert seen == [(i + 1, wanted[i], wanted[i]) for i in range(6)]
    assert second == [1, 2, 3, 4, 5, 6]
    handle.remove()
    step(model, optimizer)
    assert len(seen) == 6 and len(second) == 7


def test_callbacks_are_called_after_skipped_steps_steps_by_hand_and_freezing():
    model, optimizer, allocator = adalora()
    seen = []
    allocator.on_step(lambda a: seen.append((a.steps, a.skipped_steps, a.frozen, a.budget)))
    step(model, optimizer, math.inf)
    allocator.step(optimizer)
    allocator.freeze(optimizer)
    assert seen == [(0, 1, False, 8), (0, 1, True, 4)]


def test_copies_leave_callbacks_behind_and_nothing_is_kept_alive():
    _, _, allocator = adalora()
    seen = []
    allocator.on_step(seen.append)
    assert not copy.deepcopy(allocator)._callbacks
    log = rw.TensorBoardLog(Writer(), allocator)
    gone = weakref.ref(allocator)
    del allocator, log
    gc.collect()
    assert gone() is None


def test_adalora_is_logged_at_the_optimizer_s_steps():
    model, optimizer, allocator = adalora()
    log = rw.TensorBoardLog(writer := Writer(), allocator)
    allocator.attach(optimizer)
    step(model, optimizer)
    penalty, scores = allocator.orthogonality_penalty().item(), allocator.scores
    for _ in range(7):
        step(model, optimizer)
    found = writer.written
    assert list(found["adalora/budget"]) == list(range(1, 9))
    assert [found["adalora/budget"][i] for i in (2, 8)] == [8, 4]
    assert found["adalora/rank_mean"][8] == 2
    assert found["rank/0"][8] == allocator.ranks["0"]
    assert found["adalora/penalty"][1] == pytest.approx(penalty)
    assert found["adalora/score/mean"][1] == pytest.approx(scores.mean().item())
    assert found["adalora/score/lowest_kept"][5] >= found["adalora/score/highest_pruned"][5]
    assert 8 not in found["adalora/score/mean"]  # frozen: there are no scores any more
    log.close()
    assert not writer.closed  # it is the caller's


def test_skipped_steps_count():
    model, optimizer, allocator = adalora()
    writer = Writer()
    with rw.TensorBoardLog(writer, allocator, every=2):
        allocator.attach(optimizer)
        for gradient in (1.0, 1.0, 1.0, math.nan):
            step(model, optimizer, gradient)
    for _ in range(2):  # after its end
        step(model, optimizer)
    assert list(writer.written["adalora/budget"]) == [2, 4]
    assert (allocator.steps, allocator.skipped_steps) == (3, 3)


def test_spectral_ranks_are_logged_with_the_scores_of_events():
    model, allocator = spectral(total_steps=12, warmup_steps=2, final_steps=2)
    rw.TensorBoardLog(writer := Writer(), allocator)
    optimizer = torch.optim.SGD(trained(model), lr=0.01)
    allocator.attach(optimizer)
    train(model, optimizer, range(12))
    found = writer.written
    events = {event.step: event for event in allocator.history}
    assert events and list(found["spectral/score/lowest_kept"]) == list(events)
    assert found["spectral/budget"][12] == allocator.budget
    assert found["spectral/bank"][12] == allocator.bank
    last = max(events)
    assert [found[f"rank/{name}"][last] for name in allocator.ranks] == events[last].ranks


def test_a_folder_is_written_as_tensorboard_reads_it(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model, optimizer, allocator = adalora()
    with rw.TensorBoardLog(tmp_path / "run", allocator):
        allocator.attach(optimizer)
        for _ in range(3):
            step(model, optimizer)
    read = EventAccumulator(str(tmp_path / "run"))
    read.Reload()
    ranks = [(event.step, event.value) for event in read.Scalars("rank/0")]
    assert [number for number, _ in ranks] == [1, 2, 3] and ranks[0] == (1, 4)
    assert "adalora/penalty" in read.Tags()["scalars"]


def test_what_is_wrong_is_said(monkeypatch, tmp_path):
    _, _, allocator = adalora()
    for arguments, message in [
        ((tmp_path, 3), "TensorBoardLog: allocator must be an allocator, got 3"),
        ((tmp_path, allocator, 0), "TensorBoardLog: every must be an integer above 0, got 0"),
        ((7, allocator), "TensorBoardLog: where must be a folder or a writer, got 7"),
    ]:
        with pytest.raises(ValueError, match=message):
            rw.TensorBoardLog(*arguments)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match="needs tensorboard.*: pip install tensorboard"):
        rw.TensorBoardLog(tmp_path, allocator)
    assert not allocator._callbacks
