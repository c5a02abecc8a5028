"""`rankwise sweep`: ranks and learning rates by cross-validation of a task of the user's."""

import hashlib
import importlib.util
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..config import LoRAConfig
from ..sweep_grid import adapter_parameters, rank_grid, text_of
from ..sweeping import Sweep
from ..sweeping import sweep as run_sweep
from .output import AsJson, answer, table

DAY = 86400  # seconds; the time left is told by all trainings so far


def sweep(
    task: Annotated[
        Path, typer.Argument(help="A Python file with EXAMPLES and train(), see docs/advice.md.")
    ],
    ranks: Annotated[str, typer.Option(help="Separated by commas.")],
    rates: Annotated[str, typer.Option(help="Learning rates, separated by commas.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder of results and the picture.")
    ],
    alpha: Annotated[str, typer.Option(help='A number, or "r", "2r", ... of each rank.')] = "2r",
    folds: Annotated[int, typer.Option(min=2, help="Of the cross-validation.")] = 5,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each fold.")] = 1,
    targets: Annotated[
        str | None, typer.Option(help='Sets of target_modules to compare, as in "q,v;q,k,v,o".')
    ] = None,
    budget: Annotated[
        Literal["rank", "equal"],
        typer.Option(help="Sets have the same rank, or at most the first one's parameters."),
    ] = "rank",
    as_json: AsJson = False,
) -> None:
    """Train with every rank, rate and fold.

    Prints the best rate of each rank, its score and its spread. Results are kept in the folder as
    they come, so that a sweep that was stopped goes on. Exits with 1 where a training failed.
    """
    chosen = {"ranks": _numbers("--ranks", ranks, int), "rates": _numbers("--rates", rates, float)}
    sets = None if targets is None else [own.split(",") for own in targets.split(";")]
    with redirect_stdout(sys.stderr):  # what the task prints is no part of the answer
        own_task = _Task(task)
        model = own_task.new_model() if own_task.new_model is not None else None
    if budget == "equal" and model is None:
        raise ValueError(f"{task}: --budget equal needs its new_model(), to count parameters")
    configs = rank_grid(
        own_task.config, chosen["ranks"], alpha, sets, model if budget == "equal" else None
    )
    with redirect_stdout(sys.stderr), _progress() as bar:
        line = bar.add_task("trainings")
        found = run_sweep(
            own_task.train, own_task.examples, configs, chosen["rates"], folds=folds, seeds=seeds,
            file=output / "results.jsonl", task=own_task.identity,
            progress=lambda done, total: bar.update(line, completed=done, total=total),
        )  # fmt: skip
    parameters = {
        name: None if model is None else adapter_parameters(model, config)
        for name, config in configs.items()
    }
    report = {
        "results": str(output / "results.jsonl"),
        "pictures": _draw(found, output),
        "trainings": len(found.rows) + len(found.failed),
        "made_now": found.made,
        "failed_trainings": len(found.failed),
        "failed": found.failed,
        "configurations": {name: _entry(found, name, parameters[name]) for name in configs},
    }
    answer(report, as_json, *_tables(report["configurations"], found))
    if found.failed:
        raise typer.Exit(1)


class _Task:
    """What a task's file defines."""

    def __init__(self, path: Path) -> None:
        self.identity = f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
        module = _imported(path)
        for name, what in (("EXAMPLES", "an integer"), ("train", "a function")):
            if not hasattr(module, name):
                raise ValueError(f"{path}: must define {name}, {what}")
        if not callable(module.train):
            raise ValueError(f"{path}: train must be a function, got {module.train!r}")
        self.examples, self.train = module.EXAMPLES, module.train
        self.config = getattr(module, "CONFIG", LoRAConfig(target_modules="all-linear"))
        self.new_model = getattr(module, "new_model", None)


def _imported(path: Path) -> ModuleType:
    """The file as a module, which finds others beside it, as a script does."""
    name = f"sweep_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path}: must be a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    return module


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeRemainingColumn())  # fmt: skip
    disable = not console.is_terminal
    return Progress(*columns, console=console, disable=disable, speed_estimate_period=DAY)


def _draw(found: Sweep, output: Path) -> list[str]:
    """The pictures' files, one for each set of targets; none without scores or matplotlib."""
    if not found.rows or importlib.util.find_spec("matplotlib") is None:
        return []
    from ..plots import sweep_curves

    rows: dict[str, list[dict]] = {}
    for row in found.rows:
        rows.setdefault(text_of(found.configs[row["name"]].target_modules), []).append(row)
    files = []
    for place, (targets, own) in enumerate(rows.items(), 1):
        several = len(rows) > 1
        title = f"Score by learning rate: {targets}" if several else "Score by learning rate"
        files.append(str(output / (f"sweep-{place}.png" if several else "sweep.png")))
        sweep_curves(own, title).savefig(files[-1], dpi=150)
    return files


def _entry(found: Sweep, name: str, parameters: int | None) -> dict:
    config, best = found.configs[name], found.best(name)
    return {
        "rank": config.rank,
        "alpha": config.alpha,
        "parameters": parameters,
        "best_rate": None if best is None else best.rate,
        "score": None if best is None else best.mean,
        "deviation": None if best is None else best.deviation,
        "scores": {f"{own.rate:g}": own.mean for own in found.scored(name)},
    }


def _tables(entries: dict[str, dict], found: Sweep) -> list[Table]:
    rates = sorted({row["rate"] for row in (*found.rows, *found.failed)})
    best = table("", "alpha", "parameters", "best rate", "score", "deviation")
    means = table("mean score at", *(f"{rate:g}" for rate in rates))
    for name, own in entries.items():
        known = own["best_rate"] is not None
        parts = (f"{own['best_rate']:g}", f"{own['score']:.4f}", f"+- {own['deviation']:.4f}")
        count = "-" if own["parameters"] is None else f"{own['parameters']:,}"
        best.add_row(name, f"{own['alpha']:g}", count, *(parts if known else "---"))
        scores = (own["scores"].get(f"{rate:g}") for rate in rates)
        means.add_row(name, *("-" if score is None else f"{score:.4f}" for score in scores))
    failed = table("failed", "rate", "fold", "seed", "why")
    for row in found.failed:
        failed.add_row(row["name"], f"{row['rate']:g}", str(row["fold"]), str(row["seed"]),
                       row["error"])  # fmt: skip
    return [best, means, *([failed] if found.failed else [])]


def _numbers(option: str, text: str, kind: type) -> list:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        wanted = "integers" if kind is int else "numbers"
        raise typer.BadParameter(
            f"{option} must be {wanted} separated by commas, got {text!r}"
        ) from None
