# The penalty in a model under DistributedDataParallel, also of layers that take no part in forward.
from contextlib import nullcontext

import torch
import torch.distributed as dist
from processes import run_processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import rankwise as rw

STEPS, WORLD = 6, 2
OPTIONS = dict(initial_rank=4, target_rank=2, alpha=8.0, total_steps=STEPS, final_steps=2)


class Net(nn.Module):
    """Three layers, [batch, 8] -> [batch, 8]; the third is used when it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8).double() for _ in range(3))
        self.deep = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.tanh(self.first(x)))
        return self.third(x) if self.deep else x


class Bert(nn.Module):
    """Computes the pooler too, and leaves it out of what it returns."""

    def __init__(self) -> None:
        super().__init__()
        import transformers  # which takes its time, in each process

        sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        config = transformers.BertConfig(vocab_size=20, **sizes, hidden_dropout_prob=0.0,
                                         attention_probs_dropout_prob=0.0)  # fmt: skip
        self.bert = transformers.BertModel(config, add_pooling_layer=True).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.bert(x).last_hidden_state


def batches(net: str, rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    if net == "Bert":
        return torch.randint(20, (3, 5), generator=generator)
    return torch.randn(3, 8, generator=generator, dtype=torch.float64)


def build(net: str):
    torch.manual_seed(0)
    config = rw.AdaLoRAConfig(target_modules="all-linear", **OPTIONS)
    model = rw.apply_lora({"Net": Net, "Bert": Bert}[net](), config)
    for layer in model.modules():
        if isinstance(layer, rw.nn.AdaLoRALinear):
            nn.init.normal_(layer.lora_E, std=0.3)
    return model, rw.RankAllocator(model, config)


def loss_of(model, allocator, x: Tensor, form: str = "squared_sum") -> Tensor:
    return model(x).square().mean() + 0.1 * allocator.orthogonality_penalty(form)


def train(model, allocator, inputs, form: str, scale: float = 1.0, wrapped=None):
    """`inputs`: the batches of each step, whose losses are averaged. The last gradients."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.02)
    allocator.attach(optimizer)
    for parts in inputs:
        optimizer.zero_grad()
        for i, x in enumerate(parts):
            waits = wrapped is not None and i < len(parts) - 1
            with wrapped.no_sync() if waits else nullcontext():
                loss = loss_of(wrapped or model, allocator, x, form)
                (scale * loss / len(parts)).backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= scale
        optimizer.step()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def one_process(net: str, count: int, form: str):
    """All processes' batches, `count` of each in a step, in one."""
    model, allocator = build(net)
    every = [(rank, i) for rank in range(WORLD) for i in range(count)]
    inputs = [[batches(net, rank, count * step + i) for rank, i in every] for step in range(STEPS)]
    return model, allocator, train(model, allocator, inputs, form)


def as_one(rank: int, net: str, options: dict, count: int, form: str, scale: float) -> None:
    wanted, reference, wanted_gradients = one_process(net, count, form)
    model, allocator = build(net)
    wrapped = DistributedDataParallel(model, **options)
    inputs = [[batches(net, rank, count * step + i) for i in range(count)] for step in range(STEPS)]
    gradients = train(model, allocator, inputs, form, scale, wrapped)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted_gradients[name], rtol=1e-9, atol=1e-11)
    for got, expected in zip(model.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert allocator.frozen and allocator.ranks == reference.ranks
    everyone = [None] * WORLD
    dist.all_gather_object(everyone, allocator.ranks)
    assert everyone[0] == everyone[1]


UNUSED = {"find_unused_parameters": True}
VIEWS = UNUSED | {"gradient_as_bucket_view": True}
CASES = {  # DDP's options, batches accumulated in a step, the penalty's form, the loss's scale
    "as it is": (UNUSED, 1, "squared_sum", 1.0),
    "mean_norm": (UNUSED, 1, "mean_norm", 1.0),
    "bucket views": (VIEWS, 1, "squared_sum", 1.0),
    "accumulated": (UNUSED, 2, "squared_sum", 1.0),
    "accumulated in bucket views": (VIEWS, 2, "squared_sum", 1.0),
    "scaled": (UNUSED, 1, "squared_sum", 1024.0),
    "static graph": ({"static_graph": True}, 1, "squared_sum", 1.0),
}


def cases_as_one(rank: int) -> None:
    for case, arguments in CASES.items():
        try:
            as_one(rank, "Net", *arguments)
        except Exception as error:
            raise AssertionError(case) from error


def test_two_processes_are_as_one():
    run_processes(cases_as_one, WORLD)


def test_berts_pooler_that_takes_no_part():
    run_processes(as_one, WORLD, "Bert", *CASES["as it is"])


def all_used(rank: int) -> None:
    model, allocator = build("Net")
    model.deep = True
    wrapped = DistributedDataParallel(model)
    loss_of(wrapped, allocator, batches("Net", rank, 0)).backward()
    twin, other = build("Net")
    twin.deep = True
    for r in range(WORLD):
        (loss_of(twin, other, batches("Net", r, 0)) / WORLD).backward()
    for got, wanted in zip(model.parameters(), twin.parameters(), strict=True):
        if wanted.grad is not None:
            torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        assert not allocator.orthogonality_penalty().requires_grad


def test_a_model_that_uses_all_its_layers():
    run_processes(all_used, WORLD)


def test_without_ddp_the_penalty_is_an_ordinary_node():
    model, allocator = build("Net")
    handle = model.first.lora_A.register_hook(lambda gradient: None)
    factors = [model.first.lora_A, model.third.lora_B]
    gradients = torch.autograd.grad(allocator.orthogonality_penalty(), factors, create_graph=True)
    assert all(gradient.requires_grad for gradient in gradients)
    handle.remove()
    assert model.first.lora_A.grad is None
