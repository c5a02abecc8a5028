"""The runs: a head over the frozen encoder, and LoRA and AdaLoRA on every linear layer of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from batches import TokenizedSnippets
from classifier import PREDICTION_BATCH, Classifier, accuracy, new_classifier, predict
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LinearLR
from tqdm import tqdm

import rankwise as rw

BATCH_SIZE = 32
HEAD_EPOCHS = 20  # more than the head can use; they take seconds on stored features
HEAD_LEARNING_RATE = 1e-3
RANK = 4  # of LoRA, and of AdaLoRA in the mean at the end: equal parameter counts
PENALTY_WEIGHT = 0.1  # of the orthogonality penalty, as in the AdaLoRA paper's code
WHERE = {"target_modules": "all-linear", "modules_to_save": ["head"]}


def lora_config(steps: int) -> rw.LoRAConfig:
    return rw.LoRAConfig(rank=RANK, alpha=2.0 * RANK, **WHERE)


def adalora_config(steps: int) -> rw.AdaLoRAConfig:
    """12 -> 4: a tenth of the steps to warm up, pruning every tenth step, the last third frozen."""
    return rw.AdaLoRAConfig(
        initial_rank=3 * RANK,
        target_rank=RANK,
        alpha=6.0 * RANK,
        total_steps=steps,
        warmup_steps=steps // 10,
        final_steps=steps // 3,
        allocation_interval=10,
        budget_unit="parameters",
        **WHERE,
    )


@dataclass(frozen=True)
class Method:
    """A kind of adapter: its configuration for a number of steps, and a learning rate for it."""

    name: str
    config: Callable[[int], rw.LoRAConfig | rw.AdaLoRAConfig]
    learning_rate: float


LORA = Method(f"LoRA (r {RANK})", lora_config, 1e-3)
# E starts at zero, so that A and B hardly move at first: a larger rate suits it.
ADALORA = Method(f"AdaLoRA (r {3 * RANK} to {RANK})", adalora_config, 4e-3)


@dataclass
class Run:
    """A trained model: its accuracies on the test set after each measured epoch, one loss a step.

    `seconds` is the time of training alone, `trainable` the count of parameters at its end.
    """

    model: Classifier
    trainable: int
    allocator: rw.RankAllocator | None = None
    seconds: float = 0.0
    accuracies: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        return self.accuracies[-1]


@dataclass(frozen=True)
class Features:
    """The frozen encoder's pooled output [snippets, 384], and the time for the training set."""

    train: Tensor
    test: Tensor
    seconds: float


def encode(train: TokenizedSnippets, test: TokenizedSnippets) -> Features:
    """The features of both sets: the frozen encoder never changes, so once is enough."""
    model = new_classifier(seed=0)
    start = time.perf_counter()
    with progress("frozen encoder", len(train) + len(test)) as bar:
        pooled = _pool(model, train, bar)
        seconds = time.perf_counter() - start
        return Features(pooled, _pool(model, test, bar), seconds)


@torch.no_grad()
def _pool(model: Classifier, data: TokenizedSnippets, bar: tqdm) -> Tensor:
    pooled = torch.empty(len(data), model.head.in_features)
    for batch in data.evaluation_batches(PREDICTION_BATCH):
        pooled[batch.indices] = model.pool(**batch.inputs)
        bar.update(len(batch.indices))
    return pooled


def train_head(
    features: Features, train: TokenizedSnippets, test: TokenizedSnippets, seed: int
) -> Run:
    """Run A: the encoder stays frozen, and the head is trained on the stored features."""
    model = new_classifier(seed)
    model.encoder.requires_grad_(False)
    run = Run(model, sum(p.numel() for p in model.head.parameters()))
    start = time.perf_counter()
    optimizer, schedule = _optimizer(model, HEAD_EPOCHS * _steps(train), HEAD_LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(HEAD_EPOCHS):
        for rows in torch.randperm(len(train), generator=generator).split(BATCH_SIZE):
            loss = F.cross_entropy(model.head(features.train[rows]), train.labels[rows])
            run.losses.append(take_step(loss, optimizer))
            schedule.step()
    run.seconds = features.seconds + time.perf_counter() - start
    with torch.no_grad():
        run.accuracies.append(accuracy(model.head(features.test), test.labels))
    return run


def train_adapter(
    method: Method, train: TokenizedSnippets, test: TokenizedSnippets, seed: int, epochs: int
) -> Run:
    """Runs B and C: adapters on the encoder and the head together; accuracy after every epoch.

    Raises:
        RuntimeError: an adapter does not train (rw.health_check after the first step).
    """
    steps = epochs * _steps(train)
    config = method.config(steps)
    model = rw.apply_lora(new_classifier(seed), config).train()
    optimizer, schedule = _optimizer(model, steps, method.learning_rate)
    allocator = None
    if isinstance(config, rw.AdaLoRAConfig):
        allocator = rw.RankAllocator(model, config)
        allocator.attach(optimizer)
    run = Run(model, 0, allocator)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        with progress(f"{method.name}, epoch {epoch} of {epochs}", len(train)) as bar:
            for batch in train.training_batches(BATCH_SIZE, generator):
                loss = F.cross_entropy(model(**batch.inputs), batch.labels)
                run.losses.append(take_step(loss, optimizer, _penalty(allocator)))
                schedule.step()
                if len(run.losses) == 1:
                    tqdm.write(f"health check after the first step: {_healthy(model)}")
                bar.set_postfix(loss=f"{mean(run.losses[-20:]):.3f}", refresh=False)
                bar.update(len(batch.indices))
        seconds = time.perf_counter() - start
        run.seconds += seconds
        run.accuracies.append(accuracy(predict(model, test), test.labels))
        loss = mean(run.losses[-_steps(train) :])
        speed = f"{len(train) / seconds:.0f} samples/s"
        print(
            f"{method.name}, epoch {epoch}: loss {loss:.3f}, accuracy {run.accuracy:.4f}, {speed}"
        )
    run.trainable = _trained_parameters(model)
    return run


def _penalty(allocator: rw.RankAllocator | None) -> Tensor | float:
    """What keeps AdaLoRA's factors near orthonormal; not part of the reported loss."""
    if allocator is None:
        return 0.0
    return PENALTY_WEIGHT * allocator.orthogonality_penalty("mean_norm")


def _trained_parameters(model: Classifier) -> int:
    """Parameters that are in use: of pruned adapters the kept directions alone."""
    layers = rw.summary(model).layers
    triplet = {x.name: x.in_features + x.out_features for x in layers}
    has_E = {name: model.get_submodule(name).lora_E is not None for name in triplet}
    adapters = sum(x.rank * (triplet[x.name] + has_E[x.name]) for x in layers)
    return adapters + sum(p.numel() for p in model.head.parameters())


def final_ranks(run: Run) -> dict[str, dict[str, int]]:
    """{projection: {layer: rank}} of the encoder's matrices."""
    ranks: dict[str, dict[str, int]] = {}
    for name, rank in run.allocator.ranks.items():
        layer, _, projection = name.removeprefix("encoder.encoder.layer.").partition(".")
        short = projection.removeprefix("attention.self.").removesuffix(".dense")
        ranks.setdefault(short, {})[layer] = rank
    return ranks


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _healthy(model: nn.Module) -> str:
    report = rw.health_check(model)
    if not report.ok:
        raise RuntimeError(str(report))
    return str(report)


def _steps(train: TokenizedSnippets) -> int:
    """Steps of an epoch; the last batch may be smaller."""
    return -(-len(train) // BATCH_SIZE)


def _optimizer(model: nn.Module, steps: int, rate: float) -> tuple[Optimizer, LinearLR]:
    """AdamW over what is trainable, with a learning rate that falls linearly to 0."""
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], rate)
    return optimizer, LinearLR(optimizer, 1.0, 0.0, total_iters=steps)


def take_step(loss: Tensor, optimizer: Optimizer, penalty: Tensor | float = 0.0) -> float:
    """Backward and the optimizer's step; the loss."""
    optimizer.zero_grad()
    (loss + penalty).backward()
    optimizer.step()
    return loss.item()


def progress(title: str, total: int) -> tqdm:
    """A bar in samples, with the time left; silent where the output is not a terminal."""
    line = "{l_bar}{bar}| {n_fmt}/{total_fmt} samples, {rate_fmt}{postfix}, {remaining} left"
    return tqdm(total=total, desc=title, unit=" samples", disable=None, bar_format=line)
