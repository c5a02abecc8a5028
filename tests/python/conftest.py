# What every Python test runs under: seeded data, restored thread counts, fixed examples.
import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "fixed", derandomize=True, deadline=None, database=None, print_blob=False
)
hypothesis.settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def repeatable():
    """Seeds torch before each test and restores the thread count after it."""
    threads = torch.get_num_threads()
    torch.manual_seed(20210617)
    yield
    torch.set_num_threads(threads)
