# The same training from the same seed in C++ (training.cpp) and in Python.
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from cpp_programs import build, output_of

import rankwise as rw

IN, HIDDEN, OUT, BATCH, STEPS = 16, 24, 8, 32, 100
LAYERS = {"lora": rw.nn.LoRALinear, "adalora": rw.nn.AdaLoRALinear}
SCHEDULE = rw.AdaLoRAConfig(
    initial_rank=6,
    target_rank=3,
    alpha=12.0,
    total_steps=STEPS,
    warmup_steps=10,
    final_steps=30,
    allocation_interval=5,
    target_modules=["up", "down"],
)


@dataclass
class Run:
    """`allocations` are (step, budget, rank, rank)."""

    losses: list[float] = field(default_factory=list)
    allocations: list[tuple[int, ...]] = field(default_factory=list)
    pattern: dict[str, list[bool]] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)


class Net(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.up = layer(IN, HIDDEN, rank=6, alpha=12.0, dropout=0.1)
        self.down = layer(HIDDEN, OUT, rank=6, alpha=12.0, dropout=0.1)

    def forward(self, x):
        return self.down(self.up(x).tanh())


def train_here(method: str, dtype: torch.dtype) -> Run:
    torch.manual_seed(7)
    model = Net(LAYERS[method]).to(dtype)
    teacher = torch.randn(OUT, IN, dtype=dtype) / 4
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    allocator = rw.RankAllocator(model, SCHEDULE) if method == "adalora" else None
    if allocator:
        allocator.attach(optimizer)
    run = Run()
    for _ in range(STEPS):
        x = torch.randn(BATCH, IN, dtype=dtype)
        loss = torch.nn.functional.mse_loss(model(x), (x @ teacher.T).tanh())
        if allocator:
            loss = loss + 0.1 * allocator.orthogonality_penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.losses.append(loss.item())
    if allocator:
        run.allocations = [(e.step, e.budget, *e.ranks) for e in allocator.history]
        run.pattern = {name: kept.tolist() for name, kept in allocator.pattern.items()}
    run.ranks = {name: getattr(model, name).rank for name in ("up", "down")}
    return run


def parse(printed: str) -> Run:
    run = Run()
    for line in printed.splitlines():
        kind, *values = line.split()
        if kind == "loss":
            run.losses.append(float(values[0]))
        elif kind == "allocation":
            run.allocations.append(tuple(int(value) for value in values))
        elif kind == "pattern":
            run.pattern[values[0]] = [value == "1" for value in values[1:]]
        else:
            run.ranks[values[0]] = int(values[1])
    return run


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return build(Path(__file__).parent, tmp_path_factory.mktemp("parity")) / "training"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_losses_and_masks_are_those_of_cpp(program, method, dtype):
    there = parse(output_of(program, method, str(dtype).removeprefix("torch.")))
    here = train_here(method, dtype)
    assert len(here.losses) == STEPS
    assert there.losses == pytest.approx(here.losses, rel=1e-6, abs=0)
    assert there.allocations == here.allocations
    assert there.pattern == here.pattern
    assert there.ranks == here.ranks


def test_the_training_prunes_shrinks_and_learns():
    """What the comparison is about does happen."""
    run = train_here("adalora", torch.float64)
    budgets = [allocation[1] for allocation in run.allocations]
    assert budgets[-1] == 6 < budgets[0] <= 12 and len(set(budgets)) > 3
    assert sum(run.ranks.values()) == 6 and run.ranks["up"] != run.ranks["down"]
    assert run.pattern["up"] != sorted(run.pattern["up"], reverse=True)
    assert run.losses[-1] < 0.5 * run.losses[0]
