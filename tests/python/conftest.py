# What every Python test runs under: seeded data, restored threads and CPU path, fixed examples.
import os
import sys

import hypothesis
import pytest
import torch

import rankwise

hypothesis.settings.register_profile(
    "fixed", derandomize=True, deadline=None, database=None, print_blob=False
)
hypothesis.settings.load_profile("fixed")

# Workers of pytest-xdist share the processors.
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(torch.get_num_threads() // workers, 1))


@pytest.fixture(autouse=True)
def repeatable():
    """Seeds torch before each test; restores the thread count, the CPU's path and a compiler that
    has compiled nothing after it: of functions that it met often it compiles no more."""
    threads = torch.get_num_threads()
    torch.manual_seed(20210617)
    yield
    torch.set_num_threads(threads)
    rankwise.ops.set_cpu_path("micro-kernel")
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
