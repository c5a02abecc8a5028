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
