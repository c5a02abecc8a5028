# Bytes: what autograd keeps of a forward, and the most that a call on the CPU allocates at a time.
from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile


def saved_bytes(forward, known: set[int]) -> int:
    """Bytes that autograd keeps for backward, besides x and parameters."""
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and not isinstance(tensor, torch.nn.Parameter):
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()  # until here, so that no storage is counted twice
    del kept
    return sum(storages.values())


def peak_bytes(action) -> int:
    """The most bytes that were allocated at a time, over what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        action()
    now = peak = 0
    for event in run.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak
