# The tensors here are tiny: a second thread would only add waiting.
import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(repeatable):
    torch.set_num_threads(1)
