# Where the tests of this folder run: importing this skips a test file on machines without a GPU.
import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("PyTorch finds no CUDA device here", allow_module_level=True)

from rankwise._library import library

if not library.cuda:
    pytest.skip("rankwise was built without its CUDA side", allow_module_level=True)

DEVICE = "cuda"
KERNEL_DTYPES = ["float32", "bfloat16", "float16", "bfloat16_float32", "float16_float32"]


def captured(run):
    """(graph, results) of run(), which has run once on a stream of its own, as capture demands."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results
