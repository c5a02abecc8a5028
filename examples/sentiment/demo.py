"""The demo: fine-tunes all-MiniLM-L6-v2 on film reviews with rankwise and checks what it promises.

Run it with `make demo`, or with `python examples/sentiment/demo.py --help` in the environment of
requirements.txt. Exits with status 1 when a promise is not kept.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated

import torch
import typer
from batches import TokenizedSnippets
from classifier import load_tokenizer
from figure import draw_training
from promises import Promise, accuracy_promise, check_adapter
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from snippets import DataError, load_snippets, split
from training import ADALORA, LORA, Run, encode, final_ranks, train_adapter, train_head

import rankwise as rw

OUTPUT = Path(__file__).resolve().parents[2] / "build" / "demo"
console = Console(highlight=False, soft_wrap=True)


def main(
    epochs: Annotated[int, typer.Option(min=1, help="Passes of each method over the data.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the head, the adapters and the batches.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Runs, with seeds from --seed on.")] = 1,
    output: Annotated[Path, typer.Option(help="Folder for adapters and figures.")] = OUTPUT,
) -> None:
    """Fine-tunes all-MiniLM-L6-v2 for the sentiment of film reviews, with LoRA and AdaLoRA."""
    start = time.perf_counter()
    sys.stdout.reconfigure(line_buffering=True)  # a pipe, too, shows each line at once
    try:
        train, test = load_data()
    except DataError as error:
        console.print(str(error), style="red")
        raise typer.Exit(1) from error
    features = encode(train, test)
    heads = [train_head(features, train, test, s) for s in range(seed, seed + seeds)]
    console.print(f"frozen encoder + head: accuracy {mean(run.accuracy for run in heads):.4f}")
    runs = {
        method.name: [
            train_adapter(method, train, test, s, epochs) for s in range(seed, seed + seeds)
        ]
        for method in (LORA, ADALORA)
    }
    promises = []
    for method, folder in ((LORA, output / "lora"), (ADALORA, output / "adalora")):
        promises.append(accuracy_promise(method.name, mean(r.accuracy for r in runs[method.name])))
        promises += check_adapter(method.name, runs[method.name][0].model, test, folder)
    head_file = output / "frozen_head.safetensors"
    save_file(heads[0].model.head.state_dict(), head_file)
    files = [
        head_file,
        *(output / kind / "adapter_model.safetensors" for kind in ("lora", "adalora")),
    ]
    runs = {"frozen encoder + head": heads, **runs}
    console.print(results(runs, files))
    allocated = runs[ADALORA.name][0]
    console.print(rank_table(final_ranks(allocated)))
    console.print(checks(promises))
    draw_training(runs, output / "training.png")
    rw.plots.rank_map(allocated.allocator.ranks).savefig(output / "ranks.png", dpi=150)
    rw.plots.budget_curve(allocated.allocator).savefig(output / "budget.png", dpi=150)
    console.print(f"adapters: {output / 'lora'}, {output / 'adalora'}")
    figures = [str(output / f"{name}.png") for name in ("training", "ranks", "budget")]
    console.print(f"figures:  {', '.join(figures)}")
    console.print(f"total time {duration(time.perf_counter() - start)}")
    if not all(promise.kept for promise in promises):
        console.print("A promise was not kept; see the table above.", style="red")
        raise typer.Exit(1)


def load_data() -> tuple[TokenizedSnippets, TokenizedSnippets]:
    """Training and test set as tokens, with a line on what they are."""
    parts = split(load_snippets())
    tokenizer = load_tokenizer()
    train, test = (TokenizedSnippets(part, tokenizer) for part in parts)
    positive = 100 * test.labels.double().mean().item()
    console.print(
        f"{len(train) + len(test):,} film-review snippets: {len(train):,} for training, "
        f"{len(test):,} held out ({positive:.1f} % positive); "
        f"torch threads: {torch.get_num_threads()}"
    )
    return train, test


def results(runs: dict[str, list[Run]], files: list[Path]) -> Table:
    """The comparison of all runs."""
    count = len(runs[LORA.name])
    seeds = f" (mean and deviation of {count} seeds)" if count > 1 else ""
    table = Table(title=f"Held-out film reviews{seeds}", title_justify="left")
    table.add_column("all-MiniLM-L6-v2")
    columns = ("accuracy", "trained\nparameters", "adapter\nfile", "training\ntime", "time\na step")
    for column in columns:
        table.add_column(column, justify="right")
    for (name, own), file in zip(runs.items(), files, strict=True):
        steps = sum(len(run.losses) for run in own)
        table.add_row(
            name,
            spread([run.accuracy for run in own]),
            f"{own[0].trainable:,}",
            f"{file.stat().st_size / 1000:,.0f} kB",
            duration(mean(run.seconds for run in own)),
            f"{1000 * sum(run.seconds for run in own) / steps:.0f} ms",
        )
    return table


def rank_table(ranks: dict[str, dict[str, int]]) -> Table:
    """What AdaLoRA made of rank 12 in each matrix."""
    table = Table(title="Ranks that AdaLoRA left", title_justify="left")
    table.add_column("matrix")
    for layer in next(iter(ranks.values())):
        table.add_column(f"layer {layer}", justify="right")
    for projection, by_layer in ranks.items():
        table.add_row(projection, *(str(rank) for rank in by_layer.values()))
    return table


def checks(promises: list[Promise]) -> Table:
    """What was promised, and what came out."""
    table = Table(title="Promises", title_justify="left")
    for column in ("what", "measured", "promised", ""):
        table.add_column(column)
    for promise in promises:
        kept = "[green]kept[/green]" if promise.kept else "[red]BROKEN[/red]"
        table.add_row(promise.what, promise.measured, promise.promised, kept)
    return table


def spread(values: list[float]) -> str:
    """The mean, and with several values their standard deviation."""
    deviation = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
    return f"{mean(values):.4f}{deviation}"


def duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s" if seconds < 100 else f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    )


if __name__ == "__main__":
    typer.run(main)
