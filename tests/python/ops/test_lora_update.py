# lora_update over the samples of lora_linear: a base's rows in the place of the base's product.
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from expected import assert_gradients, exact, problem
from recorded_graphs import recording_backend
from samples import DTYPES, NAMES, SAMPLES, Sample, leaves, tensors, views
from tolerances import assert_close, assert_same_bits

import rankwise

OPS = torch.ops.rankwise
SEED = 11
OPERANDS = {name: NAMES[name] for name in "xABE"}
LESS = list(
    {
        s.id: s
        for s in (
            replace(s, bias=False, grads=s.grads.replace("b", "").replace("W", "")) for s in SAMPLES
        )
    }.values()
)
SOME = LESS[::9]
SAMPLES_64 = [s for s in LESS if s.dtype == "float64" and s.grads][::3]


def sampled(samples: list[Sample]):
    return pytest.mark.parametrize("sample", samples, ids=[s.id for s in samples])


def base_of(sample: Sample, tensor: dict[str, torch.Tensor]) -> torch.Tensor:
    """Rows that a base may have computed, with the strides of the sample's grad_output."""
    dy = tensor["grad_output"].detach()
    return torch.roll(dy, 1, -1) if sample.grad_output == "contiguous" else dy.neg()


def arguments(sample: Sample, base: torch.Tensor, tensor: dict[str, torch.Tensor]):
    """Positional and keyword arguments; `rank` only where it is below capacity."""
    rank, capacity = sample.rank
    args = (base, *(tensor.get(name) for name in OPERANDS.values()))
    kwargs = {"scaling": sample.scaling, "dropout_p": sample.dropout}
    return args, kwargs | ({"rank": rank} if rank != capacity else {})


def raw_forward(sample: Sample, args: tuple) -> tuple[torch.Tensor, ...]:
    """(output, hidden, seed) of the inner op; draws the same seed as the public op would."""
    with torch.no_grad():
        return OPS._lora_update_forward(*args, sample.scaling, sample.dropout, sample.rank[0])


def without_weight(sample: Sample, tensor: dict[str, torch.Tensor], seed: torch.Tensor):
    """The oracle's problem of the update alone."""
    lead, n_in, n_out = sample.shape
    nothing = torch.zeros(n_out, n_in, dtype=torch.float64)
    return problem(
        {**tensor, "weight": nothing, "bias": None},
        scaling=sample.scaling,
        dropout_p=sample.dropout,
        rank=sample.rank[0],
        seed=seed,
    )


def assert_output(y: torch.Tensor, base: torch.Tensor, found: oracle.Problem) -> None:
    magnitude = oracle.forward(found.absolute()) + np.abs(exact(base))
    assert_close(y, oracle.forward(found) + exact(base), magnitude, "y")


def check(sample: Sample, device: str = "cpu") -> None:
    tensor = tensors(sample, device)
    base = base_of(sample, tensor).requires_grad_()
    args, kwargs = arguments(sample, base, tensor)
    torch.manual_seed(SEED)
    output, hidden, seed = raw_forward(sample, args)
    before = [None if a is None else a.detach().clone() for a in args]
    torch.manual_seed(SEED)
    y = rankwise.ops.lora_update(*args, **kwargs)
    assert y.shape == base.shape and y.dtype == base.dtype
    assert_same_bits(output, y, "output of the inner op and of the public one")
    found = without_weight(sample, tensor, seed)
    assert_output(y, base, found)
    assert_close(hidden, oracle.hidden(found), oracle.hidden(found.absolute()), "hidden")

    wanted = [tensor[NAMES[name]] for name in sample.grads]
    d_base, *gradients = torch.autograd.grad(y, [base, *wanted], tensor["grad_output"])
    assert_same_bits(d_base, tensor["grad_output"], "gradient of base_output")
    assert_gradients(dict(zip(sample.grads, gradients, strict=True)), tensor["grad_output"], found)
    for argument, value in zip(args, before, strict=True):
        if value is not None:
            assert_same_bits(argument, value, "an argument after forward and backward")


@sampled(LESS)
def test_output_and_gradients_match_the_oracle(sample):
    check(sample)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_and_gradients_of_many_tiles(dtype, p):
    check(Sample(dtype, ((70,), 200, 130), rank=(8, 8), dropout=p, bias=False, grads="xABE"))


@sampled(SOME)
def test_the_public_op(sample):
    tensor = tensors(sample)
    args, kwargs = arguments(sample, base_of(sample, tensor).requires_grad_(), tensor)
    torch.library.opcheck(OPS.lora_update.default, args, kwargs)


@sampled(SOME)
def test_the_inner_ops(sample):
    tensor = {name: t.detach() for name, t in tensors(sample).items()}
    args, _ = arguments(sample, base_of(sample, tensor), tensor)
    numbers = (sample.scaling, sample.dropout, sample.rank[0])
    torch.library.opcheck(OPS._lora_update_forward.default, (*args, *numbers))
    _, hidden, seed = raw_forward(sample, args)
    mask = [name in sample.grads for name in OPERANDS]
    backward = (tensor["grad_output"], *args[1:], hidden, seed, *numbers, mask)
    torch.library.opcheck(OPS._lora_update_backward.default, backward)
    assert [g is not None for g in OPS._lora_update_backward(*backward)] == mask


@sampled(SAMPLES_64)
def test_gradcheck_and_gradgradcheck(sample):
    leaf = leaves(sample)
    base = base_of(sample, views(sample, leaf)).contiguous().requires_grad_()
    wanted = [NAMES[name] for name in sample.grads]

    def function(base, *inputs):
        torch.default_generator.manual_seed(5)
        seen = views(sample, leaf | dict(zip(wanted, inputs, strict=True)))
        args, kwargs = arguments(sample, base, seen)
        return rankwise.ops.lora_update(*args, **kwargs)

    inputs = (base, *(leaf[name].requires_grad_() for name in wanted))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def plain(dtype: torch.dtype = torch.float32, adapter: torch.dtype | None = None) -> dict:
    adapter = adapter or dtype
    return {
        "base_output": torch.randn(3, 5, 16).to(dtype),
        "input": torch.randn(3, 5, 24).to(dtype),
        "lora_A": torch.randn(8, 24).to(adapter),
        "lora_B": torch.randn(16, 8).to(adapter),
        "lora_E": torch.randn(8, 1).to(adapter),
        "scaling": 2.0,
    }


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_it_is_lora_linear_without_the_product(p):
    tensor = plain(torch.float64)
    base, x, A, B, E, scaling = tensor.values()
    weight, bias = torch.randn(16, 24).double(), torch.randn(16).double()
    torch.manual_seed(3)
    whole = rankwise.ops.lora_linear(x, weight, bias, A, B, E, scaling=scaling, dropout_p=p)
    torch.manual_seed(3)
    product = torch.nn.functional.linear(x, weight, bias)
    y = rankwise.ops.lora_update(product, x, A, B, E, scaling=scaling, dropout_p=p)
    torch.testing.assert_close(y, whole, rtol=0, atol=1e-13)


def test_vmap_and_forward_mode():
    tensor = plain(torch.float64)
    base, x, *factors, scaling = tensor.values()

    def update(base, x):
        return rankwise.ops.lora_update(base, x, *factors, scaling=scaling)

    y = update(base, x)
    torch.testing.assert_close(torch.vmap(update)(base, x), y)
    _, tangent = torch.func.jvp(update, (base, x), (base, x))
    torch.testing.assert_close(tangent, y)  # it is linear in both together
    jacobian = torch.func.jacrev(update, argnums=1)(base[0, 0], x[0, 0])
    A, B, E = factors
    torch.testing.assert_close(jacobian, scaling * B @ (E * A))


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
def test_autocast_lowers_the_base_and_keeps_masters(lower):
    tensor = plain()
    factors = [tensor[name].requires_grad_() for name in ("lora_A", "lora_B", "lora_E")]
    with torch.autocast("cpu", lower):
        y = rankwise.ops.lora_update(**tensor)
    low = tensor | {name: tensor[name].to(lower) for name in ("base_output", "input")}
    assert_same_bits(y, rankwise.ops.lora_update(**low), "y under autocast")
    gradients = torch.autograd.grad(y, factors, torch.ones_like(y))
    assert {g.dtype for g in gradients} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bfloat16_float32", "float64"])
def test_the_same_bits_for_any_threads_and_rows(dtype):
    base_dtype, adapter = DTYPES[dtype]
    generator = torch.Generator().manual_seed(4)

    def normal(*size: int, dtype: torch.dtype = base_dtype) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    base, x, A, B = normal(300, 200), normal(300, 576), normal(8, 576), normal(200, 8)
    factors = [A.to(adapter).requires_grad_(), B.to(adapter).requires_grad_()]
    x.requires_grad_()

    def step() -> list[torch.Tensor]:
        torch.manual_seed(2)
        y = rankwise.ops.lora_update(base, x, *factors, scaling=0.5, dropout_p=0.1)
        return [y, *torch.autograd.grad(y, [x, *factors], torch.cos(y.detach()))]

    first = step()
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        for got, expected in zip(step(), first, strict=True):
            assert_same_bits(got, expected, f"with {threads} threads")
    whole = rankwise.ops.lora_update(base, x, *factors, scaling=0.5)
    few = rankwise.ops.lora_update(base[7:40], x[7:40], *factors, scaling=0.5)
    assert_same_bits(few, whole[7:40], "rows alone")


def test_both_cpu_paths_compute_it():
    tensor = plain()
    here = rankwise.ops.lora_update(**tensor)
    for path in ("ATen", "measured"):
        rankwise.ops.set_cpu_path(path)
        torch.testing.assert_close(rankwise.ops.lora_update(**tensor), here)


def test_compiled_graphs_hold_the_op_whole():
    backend, called = recording_backend()
    tensor = plain()

    @torch.compile(fullgraph=True, backend=backend)
    def update(base, x, A, B, E):
        return rankwise.ops.lora_update(base * 2, x, A, B, E, scaling=2.0)

    base, x, A, B, E, scaling = tensor.values()
    y = update(base, x, A.requires_grad_(), B, E)
    assert_same_bits(y, rankwise.ops.lora_update(base * 2, x, A, B, E, scaling=2.0), "compiled y")
    assert OPS._lora_update_forward.default in called["forward"]


def test_saved_for_backward_are_x_the_factors_and_hidden():
    tensor = plain()
    tensor["lora_A"].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rankwise.ops.lora_update(**tensor)
    held = {t.data_ptr() for t in tensor.values() if isinstance(t, torch.Tensor)}
    new = [t for t in saved if t.data_ptr() not in held and t.numel()]
    assert [tuple(t.shape) for t in new] == [(15, 8)]
    assert tensor["base_output"].data_ptr() not in {t.data_ptr() for t in saved}


REFUSED = [  # argument, what it becomes, the message
    ("base_output", lambda t: t[..., :15], r"base_output must be \[3, 5, 16\], got \[3, 5, 15\]"),
    ("base_output", lambda t: t[0], r"base_output must be \[3, 5, 16\], got \[5, 16\]"),
    ("base_output", lambda t: t.double(), "base_output must be float32 like input, got float64"),
    ("input", lambda t: t[..., :23], r"lora_A must be \[rank, 23\], got \[8, 24\]"),
    ("input", lambda t: t.long(), "input must be float64, float32, bfloat16 or float16, got Long"),
    ("input", lambda t: t[0, 0, 0], r"input must be \[..., in_features\], got a scalar"),
    ("lora_A", lambda t: t[0], r"lora_A must be \[rank, 24\], got \[24\]"),
    ("lora_A", lambda t: t.half(), "lora_A must be float32 like input.* got float16"),
    ("lora_B", lambda t: t[0], r"lora_B must be \[out_features, rank\], got \[8\]"),
    ("lora_B", lambda t: t[:, :7], r"lora_B must be \[16, 8\], got \[16, 7\]"),
    ("lora_E", lambda t: t.t(), r"lora_E must be \[8, 1\], got \[1, 8\]"),
    ("lora_A", lambda t: t.to("meta"), "lora_A must be on cpu like input, got meta"),
    ("scaling", lambda t: float("nan"), "scaling must be finite, got nan"),
]


@pytest.mark.parametrize("name, change, message", REFUSED)
def test_refusals_name_the_argument(name, change, message):
    tensor = plain()
    with pytest.raises(RuntimeError, match=f"lora_update: {message}"):
        rankwise.ops.lora_update(**{**tensor, name: change(tensor[name])})


@pytest.mark.parametrize(
    "number, message",
    [({"rank": 9}, r"rank must be in \[0, 8\], got 9"),
     ({"dropout_p": 1.5}, r"dropout_p must be in \[0, 1\], got 1.5")],
)  # fmt: skip
def test_refused_numbers(number, message):
    with pytest.raises(RuntimeError, match=f"lora_update: {message}"):
        rankwise.ops.lora_update(**plain(), **number)
