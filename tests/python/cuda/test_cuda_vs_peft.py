# Errors and saved bytes on CUDA: at most those of PEFT's eager layer, also under autocast.
import pytest
import test_accuracy_vs_peft
import test_saved_bytes
import torch
from cuda_device import DEVICE
from layer_shapes import SHAPES
from samples import DTYPES


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "bfloat16_float32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_pefts(shape, dtype):
    test_accuracy_vs_peft.check(shape, dtype, DEVICE)


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_pefts_under_autocast(shape, lower):
    dtype = {torch.bfloat16: "bfloat16_float32", torch.float16: "float16_float32"}[lower]
    with torch.autocast(DEVICE, lower):
        test_accuracy_vs_peft.check(shape, dtype, DEVICE)


@pytest.mark.parametrize("input_grad", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_saved_bytes_are_at_most_pefts(dtype, p, gated, input_grad):
    test_saved_bytes.check(dtype, p, gated, input_grad, DEVICE)
