"""What the study trains on: digits that a small network has not seen, and film reviews."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "sentiment"))


@dataclass(frozen=True)
class Task:
    """A frozen model and how it is trained. Splits are "train", "validation" and "test".

    Args:
        name: of the task.
        rank: the mean rank of all methods at the end.
        steps: of a training.
        targets: config.target_modules.
        whole: modules that are trained whole, beside the adapters.
        new_model: of a seed, its base the same for all.
        losses: of a model and a seed, the loss of batch after batch without end.
        accuracy: of a model on a split.
    """

    name: str
    rank: int
    steps: int
    targets: list[str] | str
    whole: list[str]
    new_model: Callable[[int], nn.Module]
    losses: Callable[[nn.Module, int], Iterator[Tensor]]
    accuracy: Callable[[nn.Module, str], float]


SPLIT_SEED = 1


def digits() -> Task:
    """scikit-learn's digits 5 to 9, for a network that was trained on 0 to 4, under a new head."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.tensor(found.images, dtype=torch.float32).flatten(1) / 16
    labels = torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=Generator().manual_seed(SPLIT_SEED))
    first, wanted = (order[own[order]] for own in (labels < 5, labels >= 5))
    count = len(wanted) // 5
    rows = {"test": wanted[:count], "validation": wanted[count : 2 * count]}
    rows["train"] = wanted[2 * count :]
    base = _network_of(pixels[first], labels[first])

    def batches(seed: int, size: int = 32) -> Iterator[Tensor]:
        generator = Generator().manual_seed(seed)
        while True:
            yield from rows["train"][torch.randperm(len(rows["train"]), generator=generator)].split(
                size
            )

    def losses(model: nn.Module, seed: int) -> Iterator[Tensor]:
        for own in batches(seed):
            yield F.cross_entropy(model(pixels[own]), labels[own])

    @torch.no_grad()
    def accuracy(model: nn.Module, split: str) -> float:
        right = model(pixels[rows[split]]).argmax(1) == labels[rows[split]]
        return right.double().mean().item()

    def new_model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = copy.deepcopy(base)
        model[-1].reset_parameters()
        return model

    return Task("digits", 1, 400, ["0", "2", "4", "6"], ["8"], new_model, losses, accuracy)


def _network_of(pixels: Tensor, labels: Tensor) -> nn.Sequential:
    with torch.random.fork_rng([]):
        torch.manual_seed(SPLIT_SEED)
        hidden = [part for _ in range(3) for part in (nn.Linear(128, 128), nn.ReLU())]
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), *hidden, nn.Linear(128, 10))
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        for _ in range(300):
            own = torch.randint(len(labels), (64,))
            optimizer.zero_grad()
            F.cross_entropy(model(pixels[own]), labels[own]).backward()
            optimizer.step()
    return model.requires_grad_(False)


def reviews() -> Task:
    """Film reviews for all-MiniLM-L6-v2 under a head that is trained with the adapters."""
    from batches import TokenizedSnippets
    from classifier import accuracy as share
    from classifier import load_tokenizer, new_classifier, predict
    from snippets import load_snippets, split

    train, test = split(load_snippets())
    count = len(test)
    parts = {"train": train[count:], "validation": train[:count], "test": test}
    tokenizer = load_tokenizer()
    data = {name: TokenizedSnippets(own, tokenizer) for name, own in parts.items()}

    def losses(model: nn.Module, seed: int) -> Iterator[Tensor]:
        generator = Generator().manual_seed(seed)
        while True:
            for batch in data["train"].training_batches(32, generator):
                yield F.cross_entropy(model(**batch.inputs), batch.labels)

    def accuracy(model: nn.Module, split: str) -> float:
        return share(predict(model, data[split]), data[split].labels)

    steps = -(-len(parts["train"]) // 32)  # one pass
    return Task("reviews", 1, steps, "all-linear", ["head"], new_classifier, losses, accuracy)


TASKS: dict[str, Callable[[], Task]] = {"digits": cache(digits), "reviews": cache(reviews)}
