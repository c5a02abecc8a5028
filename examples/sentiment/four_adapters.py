"""One all-MiniLM-L6-v2, four adapters: film and product reviews, editorials and tweets.

Each adapter, with its head, is trained on texts of one kind and tried on those of all four; then
all are loaded over one base again, which is switched between them.
`python examples/sentiment/four_adapters.py --help`, in the environment of requirements.txt.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from batches import TokenizedSnippets
from classifier import Classifier, accuracy, load_tokenizer, new_classifier, predict
from figure import draw_accuracies_of_kinds
from rich.console import Console
from rich.table import Table
from snippets import CACHE, FILES, load_snippets, split
from torch.nn import functional as F
from torch.optim import AdamW
from training import BATCH_SIZE, LORA, mean, progress, take_step

import rankwise as rw

OUTPUT = Path(__file__).resolve().parents[2] / "build" / "four_adapters"
KINDS = tuple(FILES)
console = Console(highlight=False, soft_wrap=True)

Data = dict[str, tuple[TokenizedSnippets, TokenizedSnippets]]  # kind -> (training, test)


def main(
    epochs: Annotated[int, typer.Option(min=1, help="Passes of each adapter.")] = 2,
    texts: Annotated[int, typer.Option(min=40, help="Of each kind, at most.")] = 3_700,
    seed: Annotated[int, typer.Option(help="Of the heads, the adapters and the batches.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for adapters and the figure.")] = OUTPUT,
) -> list[list[float]]:
    """Trains four adapters over one encoder; the accuracies, adapter by kind of text."""
    data = load_data(texts)
    model = new_classifier(seed)
    for kind in KINDS:
        train(model, kind, data[kind][0], epochs, seed)
        rw.save_adapter(model, output / kind, kind)
    accuracies = [[tried(model, kind, data[other][1]) for other in KINDS] for kind in KINDS]
    console.print(results(accuracies))
    console.print(switched(model, data, output, seed))
    draw_accuracies_of_kinds(accuracies, KINDS, output / "accuracy.png")
    console.print(f"adapters: {', '.join(str(output / kind) for kind in KINDS)}")
    console.print(f"figure:   {output / 'accuracy.png'}")
    return accuracies


def load_data(texts: int) -> Data:
    """The first `texts` of each kind's random order, four fifths for training."""
    tokenizer = load_tokenizer()
    data = {}
    for kind in KINDS:
        training, test = split(load_snippets(CACHE, kind))
        training, test = training[: texts * 4 // 5], test[: texts // 5]
        data[kind] = TokenizedSnippets(training, tokenizer), TokenizedSnippets(test, tokenizer)
    return data


def train(model: Classifier, kind: str, data: TokenizedSnippets, epochs: int, seed: int) -> None:
    """A new adapter of the model's, and it alone."""
    config = LORA.config(0)
    if kind == KINDS[0]:
        rw.apply_lora(model, config, kind)
    else:
        rw.add_adapter(model, kind, config)
        rw.activate_adapter(model, kind)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], LORA.learning_rate)
    generator, losses = torch.Generator().manual_seed(seed), []
    model.train()
    with progress(kind, epochs * len(data)) as bar:
        for _ in range(epochs):
            for batch in data.training_batches(BATCH_SIZE, generator):
                loss = F.cross_entropy(model(**batch.inputs), batch.labels)
                losses.append(take_step(loss, optimizer))
                bar.set_postfix(loss=f"{mean(losses[-20:]):.3f}", refresh=False)
                bar.update(len(batch.indices))
    model.eval()
    console.print(f"{kind}: {len(losses)} steps, loss {mean(losses[-20:]):.3f}")


def tried(model: Classifier, kind: str, data: TokenizedSnippets) -> float:
    rw.activate_adapter(model, kind)
    return accuracy(predict(model, data), data.labels)


def results(accuracies: list[list[float]]) -> Table:
    table = Table("adapter", *KINDS, title="accuracy, held-out texts")
    for kind, row in zip(KINDS, accuracies, strict=True):
        table.add_row(kind, *(f"{value:.4f}" for value in row))
    return table


def switched(model: Classifier, data: Data, folder: Path, seed: int) -> str:
    """Loads the four over one new base, and compares; what switching takes.

    Raises:
        RuntimeError: a loaded adapter answers otherwise than the trained one.
    """
    served = new_classifier(seed)
    for kind in KINDS:
        rw.load_adapter(served, folder / kind, name=kind)
    seconds = []
    for kind in KINDS:
        start = time.perf_counter()
        rw.activate_adapter(served, kind)
        seconds.append(time.perf_counter() - start)
        rw.activate_adapter(model, kind)
        test = data[kind][1]
        if not torch.equal(predict(served, test), predict(model, test)):
            raise RuntimeError(f"{kind}: the loaded adapter answers otherwise than the trained one")
    size = sum(path.stat().st_size for path in folder.glob("*/adapter_model.safetensors"))
    base = sum(p.numel() * p.element_size() for p in new_classifier(seed).parameters())
    return (
        f"four adapters over one base, bit for bit as trained: {size / 1e6:.1f} MB beside "
        f"{base / 1e6:.1f} MB; a switch takes {1000 * mean(seconds):.1f} ms"
    )


if __name__ == "__main__":
    typer.run(main)
