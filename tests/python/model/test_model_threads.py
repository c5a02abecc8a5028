# Several threads and forked processes: the results of one thread, and nothing waits for ever.
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import rankwise as rw

THREADS, STEPS = 8, 12
LAYERS = ["0", "2"]


def adapted(config=None, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5))
    rw.apply_lora(model, config or rw.LoRAConfig(rank=3, target_modules=LAYERS))
    with torch.no_grad():
        for parameter in trained(model):
            parameter.normal_(std=0.3)
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def inputs(seed: int) -> torch.Tensor:
    return torch.randn(7, 12, generator=torch.Generator().manual_seed(seed))


def in_threads(action: Callable[[int], object]) -> list:
    """[action(i)] of all threads, which begin together; what one of them raises is raised."""
    together, results = threading.Barrier(THREADS), [None] * THREADS

    def run(i: int) -> None:
        together.wait()
        try:
            results[i] = action(i)
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def test_eight_threads_have_the_gradients_of_one():
    model = adapted()

    def gradients(i: int) -> list[torch.Tensor]:
        return torch.autograd.grad(model(inputs(i)).square().sum(), trained(model))

    def repeated(i: int) -> bool:
        return all(all(map(torch.equal, gradients(i), wanted[i])) for _ in range(50))

    wanted = [gradients(i) for i in range(THREADS)]
    assert in_threads(repeated) == [True] * THREADS


SCHEDULE = dict(initial_rank=4, total_steps=STEPS, final_steps=3, target_modules=LAYERS)
ADALORA = rw.AdaLoRAConfig(target_rank=2, **SCHEDULE)
SPECTRAL = rw.SpectralConfig(
    rule=lambda question: [3, 2], allocation_interval=1, warmup_steps=1, alpha=4.0, **SCHEDULE
)
ALLOCATORS = {"AdaLoRA": (rw.RankAllocator, ADALORA), "rule": (rw.SpectralAllocator, SPECTRAL)}


@pytest.mark.parametrize("kind", ALLOCATORS)
def test_models_train_in_threads_as_alone(kind):
    """Their allocators call back into Python from C++, for the optimizer's state and for ranks."""
    allocator_of, config = ALLOCATORS[kind]

    def training(i: int):
        model = adapted(config, seed=i)
        allocator = allocator_of(model, config)
        optimizer = torch.optim.AdamW(trained(model), 0.03)
        allocator.attach(optimizer)
        return model, allocator, optimizer

    def train(i: int):
        model, allocator, optimizer = trainings[i]
        for step in range(STEPS):
            optimizer.zero_grad()
            model(inputs(100 * i + step)).square().mean().backward()
            optimizer.step()
        return [p.detach().clone() for p in trained(model)], allocator.ranks

    trainings = [training(i) for i in range(THREADS)]
    alone = [train(i) for i in range(THREADS)]
    trainings = [training(i) for i in range(THREADS)]
    for (factors, ranks), (wanted, wanted_ranks) in zip(in_threads(train), alone, strict=True):
        assert ranks == wanted_ranks and all(map(torch.equal, factors, wanted))
    assert all(sum(ranks.values()) < 8 for _, ranks in alone)


STEPS_IN_BACKWARD = """
import faulthandler, threading, torch, rankwise as rw
faulthandler.dump_traceback_later(120, exit=True)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
calls = []
def rule(question):
    calls.append(threading.current_thread().name)
    return [2, 1]
config = rw.SpectralConfig(target_modules=["0", "1"], initial_rank=2, alpha=2.0, total_steps=20,
                           warmup_steps=0, final_steps=2, allocation_interval=1, rule=rule)
rw.apply_lora(model, config)
allocator = rw.SpectralAllocator(model, config)
factors = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(factors, 0.01)
allocator.attach(optimizer)
last = model[0].lora_A  # its gradient is the last that a backward pass computes
last.register_post_accumulate_grad_hook(lambda parameter: optimizer.step())
done = threading.Event()
def busy():  # wants the interpreter's lock all the time
    while not done.is_set():
        sum(range(100))
def train():
    for step in range(6):
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.zero_grad()
threads = [threading.Thread(target=busy), threading.Thread(target=train, name="trains")]
for thread in threads:
    thread.start()
threads[1].join()
done.set()
assert set(calls) == {"trains"} and allocator.steps == 6, (calls, allocator.steps)
"""


def test_a_rule_called_from_a_backward_pass_does_not_wait_for_itself():
    """Python -> autograd -> hook -> optimizer -> allocator -> rule, beside a busy thread."""
    command = [sys.executable, "-c", STEPS_IN_BACKWARD]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


class Outputs(Dataset):
    """A model's outputs, computed where an item is asked for."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.model(inputs(i)).detach()


def test_workers_forked_after_training_compute_the_same():
    model = adapted()
    model(inputs(0)).sum().backward()  # torch's threads are there
    outputs = Outputs(model)
    loader = DataLoader(outputs, batch_size=None, num_workers=2, multiprocessing_context="fork",
                        timeout=60)  # fmt: skip
    for i, output in enumerate(loader):
        assert torch.equal(output, outputs[i])
    assert i == len(outputs) - 1
