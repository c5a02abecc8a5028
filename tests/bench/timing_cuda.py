# Time on the device: events around many calls over rotating tensors, graph replays, host time.
from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import cycle

import torch

Action = Callable[[], object]
CALLS = 20  # between two events, at most


def rotating(actions: Sequence[Action]) -> Action:
    """One call of the next action, so that no call finds its tensors in the cache."""
    following = cycle(actions)
    return lambda: next(following)()


def device_milliseconds(action: Action, calls: int = CALLS) -> float:
    """Of one call, with the calls following each other without a pause."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        action()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


class Graph:
    """All actions, captured one after the other; a call replays them."""

    def __init__(self, actions: Sequence[Action]):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for action in actions:
                action()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph, self.actions = torch.cuda.CUDAGraph(), len(actions)
        with torch.cuda.graph(self.graph):
            for action in actions:
                action()

    def __call__(self) -> None:
        self.graph.replay()

    def milliseconds(self, calls: int = CALLS) -> float:
        """Of one action, from replays of at least `calls`."""
        replays = -(-calls // self.actions)
        return device_milliseconds(self, replays) / self.actions


def host_microseconds(action: Action, calls: int = 100) -> float:
    """What a call costs its thread; the work must be small, so that no queue fills."""
    for _ in range(10):
        action()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        action()
    taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e6 * taken / calls


def peak_bytes(action: Action) -> int:
    """The most bytes that were allocated at a time, over what there was before."""
    action()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    action()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
