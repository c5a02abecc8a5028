# Which path serves which tensor, empty inputs, autocast, TF32, errors, and the allocated memory.
import pytest
import torch
from cuda_device import DEVICE, KERNEL_DTYPES
from samples import DTYPES
from test_determinism import tensors
from tolerances import assert_same_bits

import rankwise
from rankwise.ops import lora_linear, path


def grads(y: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(y, leaves, torch.ones_like(y)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_serve(dtype):
    assert path(torch.empty(1, device=DEVICE, dtype=dtype)) == "cuda"


def test_float64_takes_the_composite_path_and_says_why():
    found = path(torch.empty(1, device=DEVICE, dtype=torch.float64))
    assert found == "cuda (composite): no kernels for Double"


def launched(action) -> list[str]:
    """Names of the kernels that an action runs."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as run:
        action()
        torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA
    return [e.name for e in run.events() if e.device_type == device]


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_no_pass_over_x_or_y_besides_kernels_and_products(dtype):
    """Forward and backward launch nothing that casts, scales, drops or adds."""
    tensor = tensors(dtype, 256, 384, 512, 16, DEVICE)
    dy = torch.ones(256, 512, device=DEVICE, dtype=tensor[0].dtype)
    inputs = [tensor[i] for i in (0, 3, 4, 5)]

    def run() -> None:
        torch.autograd.grad(lora_linear(*tensor, scaling=2.0), inputs, dy)

    run()
    names = launched(run)
    assert any("rankwise" in name for name in names), names
    assert not [name for name in names if "elementwise" in name or "at::native" in name]


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(0, 24, 16), (5, 0, 16), (5, 24, 0), (0, 0, 0)], ids=str)
def test_empty_sizes(sizes, dtype, p):
    tokens, n_in, n_out = sizes
    tensor = [t.detach() for t in tensors(dtype, tokens, max(n_in, 1), n_out, 4, DEVICE)]
    tensor[0], tensor[1], tensor[3] = (tensor[i][:, :n_in] for i in (0, 1, 3))
    tensor = [t.requires_grad_() for t in tensor]
    y = lora_linear(*tensor, scaling=2.0, dropout_p=p)
    expected = tensor[2].expand(tokens, n_out) if n_in == 0 else y
    assert y.shape == (tokens, n_out) and torch.equal(y, expected)
    for leaf, gradient in zip(tensor, grads(y, tensor), strict=True):
        assert gradient.shape == leaf.shape and gradient.dtype == leaf.dtype
        if leaf is not tensor[2]:
            assert not gradient.any()


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_autocast_is_a_cast_of_the_base(lower, p):
    tensor = tensors("float32", 64, 96, 80, 8, DEVICE)
    x, weight, bias, *factors = tensor
    dy = torch.randn(64, 80, device=DEVICE).to(lower)
    torch.manual_seed(5)
    with torch.autocast(DEVICE, lower):
        y = lora_linear(*tensor, scaling=2.0, dropout_p=p)
    torch.manual_seed(5)
    by_hand = lora_linear(x.to(lower), weight.to(lower), bias.to(lower), *factors,
                          scaling=2.0, dropout_p=p)  # fmt: skip
    assert y.dtype == lower
    assert_same_bits(y, by_hand, "y under autocast")
    got, expected = (torch.autograd.grad(out, tensor, dy) for out in (y, by_hand))
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float32
        assert_same_bits(a, b, "a gradient under autocast")


@pytest.fixture
def matmul_settings():
    before = torch.backends.cuda.matmul.allow_tf32
    yield torch.backends.cuda.matmul
    torch.backends.cuda.matmul.allow_tf32 = before


def test_tf32_only_where_pytorch_allows_it(matmul_settings):
    tensor = [t.detach() for t in tensors("float32", 512, 1024, 1024, 8, DEVICE)]
    x, weight, bias, A, B, E = (t.double() for t in tensor)
    exact = torch.nn.functional.linear(x, weight, bias) + 2 * ((x @ A.t()) * E.t()) @ B.t()

    def error(allowed: bool) -> float:
        matmul_settings.allow_tf32 = allowed
        return (lora_linear(*tensor, scaling=2.0).double() - exact).abs().max().item()

    exactly, roughly = error(False), error(True)
    assert exactly < 1e-4 < roughly


def test_errors_name_argument_and_devices():
    x, weight, bias, A, B, E = tensors("float32", 4, 8, 8, 2, DEVICE)
    with pytest.raises(RuntimeError, match="lora_linear: lora_B must be on cuda:0.*got cpu"):
        lora_linear(x, weight, bias, A, B.detach().cpu(), E, scaling=1.0)
    with pytest.raises(RuntimeError, match="lora_linear: weight must be on cuda:0.*got cpu"):
        lora_linear(x, weight.detach().cpu(), bias, A, B, E, scaling=1.0)


def test_a_step_allocates_little_besides_its_results():
    tokens, n_in, n_out, rank = 4096, 1024, 1024, 16
    tensor = [t.detach() for t in tensors("bfloat16", tokens, n_in, n_out, rank, DEVICE)]
    lora_linear(*tensor, scaling=2.0)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = lora_linear(*tensor, scaling=2.0)
    extra = torch.cuda.max_memory_allocated() - before - y.numel() * y.element_size()
    assert extra <= (32 << 20) + tokens * n_in // 2  # cuBLASLt's workspace, and slices of sums


def test_models_move_between_devices():
    torch.manual_seed(0)
    layer = rankwise.nn.LoRALinear(48, 32, rank=4, alpha=8.0)
    with torch.no_grad():
        layer.lora_B.normal_()
    x = torch.randn(20, 48)
    expected = layer(x)
    got = layer.to(DEVICE)(x.to(DEVICE))
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-5)
