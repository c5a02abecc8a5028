"""Runs a function of a test module in several processes that make one gloo process group."""

import faulthandler
import gc
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_processes(function: Callable, world_size: int, *args, seconds: float = 120) -> None:
    """function(rank, *args) in `world_size` fresh processes on the CPU, of one thread each.

    The function must be at the top level of an importable module. What it raises, the death of a
    process and a process that still runs after `seconds` are raised here; nothing is left running.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        every = (function, world_size, store, seconds, args)
        context = mp.spawn(_process, every, world_size, join=False, daemon=True)
        end = time.monotonic() + seconds
        try:
            while not context.join(timeout=max(end - time.monotonic(), 0)):
                if time.monotonic() > end:
                    raise TimeoutError(f"{function.__name__}: not done in {seconds} s")
        finally:
            for process in context.processes:
                process.kill()
                process.join()


def _process(rank: int, function: Callable, world_size: int, store: str, seconds: float, args):
    faulthandler.enable()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=seconds),
    )
    function(rank, *args)
    gc.collect()  # what holds the group: its threads must end before Python does
    dist.destroy_process_group()
