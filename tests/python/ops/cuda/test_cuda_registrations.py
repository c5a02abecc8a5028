"""Which operators have CUDA implementations of their own; needs no GPU."""

import pytest
import torch

from rankwise._library import library

WITH_KERNELS = [
    "_dropout_mask",
    "_importance_check",
    "_importance_step_",
    "_lora_embedding_backward",
    "_lora_embedding_forward",
    "_mask_triplets_",
    "_orthogonality_backward",
    "_record_choice_",
    "_schedule_step",
    "_select_triplets_",
    "orthogonality_penalty",
]


@pytest.mark.parametrize("name", WITH_KERNELS)
def test_the_cuda_side_registers(name):
    if not library.cuda:
        pytest.skip("rankwise was built without its CUDA side")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"rankwise::{name}", "CUDA")
