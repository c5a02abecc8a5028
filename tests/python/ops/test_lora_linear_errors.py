# One test per refusal: each message names the op, the argument, what was wanted and what came.
import re

import pytest
import torch

import rankwise

OPS = torch.ops.rankwise


def good(
    dtype: torch.dtype = torch.float32, adapter: torch.dtype | None = None, device="cpu"
) -> dict:
    adapter = adapter or dtype
    return {
        "input": torch.zeros(3, 5, 768, dtype=dtype, device=device),
        "weight": torch.zeros(16, 768, dtype=dtype, device=device),
        "bias": torch.zeros(16, dtype=dtype, device=device),
        "lora_A": torch.zeros(8, 768, dtype=adapter, device=device),
        "lora_B": torch.zeros(16, 8, dtype=adapter, device=device),
        "lora_E": torch.zeros(8, 1, dtype=adapter, device=device),
        "scaling": 2.0,
    }


SHAPES = [  # argument, its wrong shape, wanted, got
    ("input", (), "[..., 768]", "scalar"),
    ("input", (3, 512), "[..., 768]", "[3, 512]"),
    ("input", (767,), "[..., 768]", "[767]"),
    ("weight", (16,), "[out_features, in_features]", "[16]"),
    ("weight", (2, 16, 768), "[out_features, in_features]", "[2, 16, 768]"),
    ("bias", (15,), "[16]", "[15]"),
    ("bias", (1, 16), "[16]", "[1, 16]"),
    ("bias", (1,), "[16]", "[1]"),
    ("lora_A", (8, 512), "[rank, 768]", "[8, 512]"),
    ("lora_A", (768,), "[rank, 768]", "[768]"),
    ("lora_A", (1, 8, 768), "[rank, 768]", "[1, 8, 768]"),
    ("lora_B", (16, 7), "[16, 8]", "[16, 7]"),
    ("lora_B", (15, 8), "[16, 8]", "[15, 8]"),
    ("lora_B", (16,), "[16, 8]", "[16]"),
    ("lora_E", (8,), "[8, 1]", "[8]"),
    ("lora_E", (7, 1), "[8, 1]", "[7, 1]"),
    ("lora_E", (8, 2), "[8, 1]", "[8, 2]"),
    ("lora_E", (1, 8), "[8, 1]", "[1, 8]"),
]
DTYPES = [  # argument, its wrong dtype, dtype of the others, wanted, got
    ("input", torch.int64, torch.float32, "float", "Long"),
    ("input", torch.complex64, torch.float32, "float", "Complex"),
    ("input", torch.bool, torch.float32, "float", "Bool"),
    ("input", torch.float8_e4m3fn, torch.float32, "float", "Float8"),
    ("weight", torch.float64, torch.float32, "float32", "float64"),
    ("weight", torch.float16, torch.bfloat16, "bfloat16", "float16"),
    ("bias", torch.float32, torch.bfloat16, "bfloat16", "float32"),
    ("lora_A", torch.bfloat16, torch.float32, "float32", "bfloat16"),
    ("lora_A", torch.float16, torch.bfloat16, "bfloat16", "float16"),
    ("lora_A", torch.float64, torch.bfloat16, "float32", "float64"),
    ("lora_A", torch.float32, torch.float64, "float64", "float32"),
    ("lora_B", torch.float32, torch.bfloat16, "bfloat16", "float32"),
    ("lora_E", torch.float32, torch.bfloat16, "bfloat16", "float32"),
    ("lora_E", torch.float64, torch.float32, "float32", "float64"),
]


def refuses(
    argument: str, wanted: str, got: str, values: dict, op=rankwise.ops.lora_linear
) -> None:
    pattern = rf"lora_linear: {argument} must .*{re.escape(wanted)}.*got .*{re.escape(got)}"
    with pytest.raises(RuntimeError, match=pattern):
        op(**values)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("argument, shape, wanted, got", SHAPES)
def test_wrong_shape(argument, shape, wanted, got, device):
    values = good(device=device)
    values[argument] = torch.zeros(shape, device=device)
    refuses(argument, wanted, got, values)


@pytest.mark.parametrize("argument, dtype, others, wanted, got", DTYPES)
def test_wrong_dtype(argument, dtype, others, wanted, got):
    values = good(others)
    values[argument] = values[argument].to(dtype)
    refuses(argument, wanted, got, values)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_unsupported_dtype_everywhere(dtype):
    refuses("input", "float64, float32, bfloat16 or float16", "", good(dtype))


@pytest.mark.parametrize("base", [torch.float64, torch.float32])
def test_narrow_factors_over_a_wider_base(base):
    for adapter in (torch.bfloat16, torch.float16):
        refuses("lora_A", str(base).split(".")[1], str(adapter).split(".")[1], good(base, adapter))


@pytest.mark.parametrize("argument", ["weight", "bias", "lora_A", "lora_B", "lora_E"])
def test_mixed_devices(argument):
    values = good()
    values[argument] = values[argument].to("meta")
    refuses(argument, "cpu", "meta", values)


def test_input_on_another_device():
    values = good()
    values["input"] = values["input"].to("meta")
    with pytest.raises(RuntimeError, match=r"lora_linear: .*(meta.*cpu|cpu.*meta)"):
        rankwise.ops.lora_linear(**values)


@pytest.mark.parametrize("p", [-0.1, 1.0000001, 2.0, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_dropout_p(p, device):
    refuses("dropout_p", "[0, 1]", "", good(device=device) | {"dropout_p": p})


@pytest.mark.parametrize("rank", [-1, 9, 2**40])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_rank(rank, device):
    refuses("rank", "[0, 8]", str(rank), good(device=device) | {"rank": rank})


@pytest.mark.parametrize("scaling", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_scaling(scaling, device):
    refuses("scaling", "finite", str(abs(scaling)), good(device=device) | {"scaling": scaling})


@pytest.mark.parametrize("argument, shape, wanted, got", SHAPES)
def test_the_inner_op_refuses_the_same(argument, shape, wanted, got):
    values = good()
    values[argument] = torch.zeros(shape)

    def forward(**values):
        return OPS._lora_linear_forward(**values, dropout_p=0.0, rank=8)

    refuses(argument, wanted, got, values, forward)


def backward(**changed):
    values = good()
    values.pop("bias")
    values |= {
        "grad_output": torch.zeros(3, 5, 16),
        "hidden": torch.zeros(15, 8),
        "seed": torch.empty(0, dtype=torch.int64),
        "dropout_p": 0.0,
        "rank": 8,
        "output_mask": [True] * 6,
    }
    return OPS._lora_linear_backward(**values | changed)


@pytest.mark.parametrize("shape", [(3, 5, 15), (15, 16), (5, 3, 16), (16,)])
def test_grad_output_of_another_shape(shape):
    assert len(backward()) == 6
    with pytest.raises(RuntimeError, match=r"lora_linear: grad_output must be \[3, 5, 16\], got"):
        backward(grad_output=torch.zeros(shape))


def test_grad_output_of_another_dtype():
    with pytest.raises(RuntimeError, match="lora_linear: grad_output must be float32.*got float64"):
        backward(grad_output=torch.zeros(3, 5, 16, dtype=torch.float64))


@pytest.mark.parametrize("hidden", [torch.zeros(15, 7), torch.zeros(14, 8), torch.zeros(120)])
def test_hidden_of_another_shape(hidden):
    with pytest.raises(RuntimeError, match=r"lora_linear: hidden must be \[15, 8\], got"):
        backward(hidden=hidden)


@pytest.mark.parametrize(
    "seed", [torch.empty(0, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), torch.zeros(1)]
)
def test_seed_of_another_shape_or_dtype(seed):
    with pytest.raises(RuntimeError, match="lora_linear: seed must be .*got"):
        backward(seed=seed, dropout_p=0.5)


def test_a_refused_call_draws_no_random_number():
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        rankwise.ops.lora_linear(**good() | {"dropout_p": 0.5, "rank": 9})
    assert torch.equal(torch.get_rng_state(), state)
