# torch.compile and torch.export of a two-layer model: one graph, no recompilation, same values.
"""With dropout compiled code gives what eager gives from the same torch.manual_seed: the op is
opaque to the compiler and draws its seed from torch's generator itself, in the same order."""

import pytest
import torch
from recorded_graphs import recording_backend
from tolerances import assert_same_bits
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import rankwise

IN, WIDTH, OUT, CAPACITY = 12, 16, 10, 6
BATCHES = (5, 8, 3, 17, 29)


class Layer(nn.Module):
    def __init__(self, n_in: int, n_out: int, dropout: float):
        super().__init__()
        self.dropout, self.rank = dropout, CAPACITY
        self.weight = nn.Parameter(torch.randn(n_out, n_in) * n_in**-0.5, requires_grad=False)
        self.bias = nn.Parameter(torch.randn(n_out), requires_grad=False)
        self.lora_A = nn.Parameter(torch.randn(CAPACITY, n_in) * n_in**-0.5)
        self.lora_B = nn.Parameter(torch.randn(n_out, CAPACITY))
        self.lora_E = nn.Parameter(torch.randn(CAPACITY, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rankwise.ops.lora_linear(
            x, self.weight, self.bias, self.lora_A, self.lora_B, self.lora_E,
            scaling=2.0, dropout_p=self.dropout, rank=self.rank,
        )  # fmt: skip


class Model(nn.Module):
    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.first, self.second = Layer(IN, WIDTH, dropout), Layer(WIDTH, OUT, dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.fixture(autouse=True)
def fresh_compiler():
    counters.clear()
    with fresh_cache():  # what another build of the ops left on disk must not be served
        yield


def graphs_compiled() -> int:
    return counters["stats"]["unique_graphs"]


def run(function, model: nn.Module, batch: int, dynamic: bool = True) -> list[torch.Tensor]:
    """[y, dx, gradients of the model's parameters], dropout seeded."""
    x = torch.linspace(-1, 1, batch * IN).sin().view(batch, IN).requires_grad_()
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
    torch.manual_seed(batch)
    y = function(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y, [x, *trained], torch.cos(y.detach()))]


def assert_same(got, expected, bits: bool) -> None:
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        if bits:
            assert_same_bits(a, b, f"result {i}")
        else:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # inductor has its own tanh


BACKENDS = [
    ("eager", 0.0),
    ("eager", 0.3),
    ("aot_eager", 0.0),
    ("aot_eager", 0.3),
    ("inductor", 0.3),
]


@pytest.mark.parametrize("backend, dropout", BACKENDS)
def test_one_graph_serves_every_batch_size(backend, dropout):
    model = Model(dropout)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in BATCHES:
            expected = run(model, model, batch)
            assert_same(run(compiled, model, batch), expected, bits=backend != "inductor")
    assert graphs_compiled() == 1


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dynamic_option_and_inference(dropout):
    model = Model(dropout).requires_grad_(False)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for batch in BATCHES:
            x = torch.randn(batch, IN)
            torch.manual_seed(1)
            expected = model(x)
            torch.manual_seed(1)
            assert_same_bits(compiled(x), expected, "y")
    assert graphs_compiled() == 1


def test_training_steps_move_compiled_and_eager_models_alike():
    torch.manual_seed(0)
    eager = Model(0.2)
    torch.manual_seed(0)
    other = Model(0.2)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    models = ((eager, eager), (other, compiled))
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-2) for m, _ in models
    ]
    for step in range(4):
        x = torch.randn(6, IN)
        for optimizer, (_, function) in zip(optimizers, models, strict=True):
            torch.manual_seed(step)
            function(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, a), b in zip(eager.named_parameters(), other.parameters(), strict=True):
        assert_same_bits(b, a, name)


def test_changing_the_rank_recompiles_at_most_once():
    model = Model()

    def function(x: torch.Tensor, rank: int) -> torch.Tensor:
        layer = model.first
        return rankwise.ops.lora_linear(
            x, layer.weight, layer.bias, layer.lora_A, layer.lora_B, scaling=2.0, rank=rank
        )

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = torch.randn(7, IN)
    for rank in (6, 5, 4, 3, 2):
        assert_same_bits(compiled(x, rank), function(x, rank), f"y at rank {rank}")
    assert graphs_compiled() <= 2


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiled_graphs_hold_the_ops_whole(dropout):
    """A decomposed op would save the dropped x for backward and use the compiler's own dropout."""
    backend, called = recording_backend()
    model = Model(dropout)
    run(torch.compile(model, fullgraph=True, backend=backend), model, 5)
    ops = torch.ops.rankwise
    assert called["forward"].count(ops._lora_linear_forward.default) == 2
    assert called["backward"].count(ops._lora_linear_backward.default) == 2
    products = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.t.default}
    assert not products & {*called["forward"], *called["backward"]}


def test_autocast_inside_compiled_code():
    model = Model()

    def low(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    compiled = torch.compile(low, fullgraph=True, backend="aot_eager")
    assert_same(run(compiled, model, 5), run(low, model, 5), bits=True)


def test_compiled_autograd():
    model = Model(0.3)
    expected = run(model, model, 5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        got = run(compiled, model, 5, dynamic=False)
        eager_forward = run(model, model, 5, dynamic=False)
    assert_same(got, expected, bits=True)
    assert_same(eager_forward, expected, bits=True)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("strict", [True, False])
def test_export_with_a_dynamic_batch(strict, dropout):
    model = Model(dropout)
    shapes = {"x": {0: torch.export.Dim("batch")}}
    program = torch.export.export(
        model, (torch.randn(4, IN),), dynamic_shapes=shapes, strict=strict
    )
    calls = [n for n in program.graph.nodes if n.target == torch.ops.rankwise.lora_linear.default]
    assert len(calls) == 2
    lowered = program.run_decompositions()
    for batch in BATCHES:
        x = torch.randn(batch, IN)
        results = []
        for function in (model, program.module(), lowered.module()):
            torch.manual_seed(batch)
            results.append(function(x))
        assert_same_bits(results[1], results[0], "exported")
        assert_same_bits(results[2], results[0], "exported and lowered")


def test_export_survives_a_file(tmp_path):
    model, x = Model(), torch.randn(4, IN)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    assert_same_bits(torch.export.load(tmp_path / "model.pt2").module()(x), model(x), "loaded")
