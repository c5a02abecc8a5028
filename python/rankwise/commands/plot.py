"""`rankwise plot`: a picture of an adapter, or of what two share."""

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..analysis import subspace_similarity, updates
from ..folder_amplification import amplifications
from ..rank_history import FILE, RankHistory
from .output import AsJson, answer

SHOWN = 6  # grids


class Kind(str, Enum):
    ranks = "ranks"
    spectra = "spectra"
    similarity = "similarity"
    amplification = "amplification"
    history = "history"


def plot(
    kind: Annotated[Kind, typer.Argument(help="What to draw.")],
    folders: Annotated[list[Path], typer.Argument(help="A PEFT folder; similarity takes two.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A .png or .svg file.")],
    module: Annotated[
        str, typer.Option(help="Only modules whose name has this, as in layer.3.")
    ] = "",
    model: Annotated[
        Path | None, typer.Option(help="The base model's folder, for amplification.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Draw ranks, spectra or similarity.

    ranks: a map of layers and projections. spectra: the singular values. similarity: phi(i, j) of
    the input's directions of two adapters. amplification: what the adapter amplifies of the base
    model's weights. history: the ranks over the steps of the training that
    left rank_history.json in the folder.
    """
    wanted = 2 if kind is Kind.similarity else 1
    if len(folders) != wanted:
        raise typer.BadParameter(
            f"{kind.value} takes {wanted} folder{'s' * (wanted > 1)}, got {len(folders)}"
        )
    if output.suffix not in (".png", ".svg"):
        raise typer.BadParameter(f"--output must end in .png or .svg, got {output.name!r}")
    if (kind is Kind.amplification) != (model is not None):
        raise typer.BadParameter("amplification, and it alone, takes --model")
    given = folders if model is None else [*folders, model]
    figure, modules = _DRAWN[kind](given, module)
    figure.savefig(output, dpi=150)
    answer({"written": str(output), "kind": kind.value, "modules": modules}, as_json)


def _updates(folder: Path, module: str) -> dict:
    found = {name: update for name, update in updates(folder).items() if module in name}
    if not found:
        raise ValueError(f"{folder}: has no module with {module!r} in its name")
    return found


def _ranks(folders: list[Path], module: str):
    from .. import plots

    found = _updates(folders[0], module)
    return plots.rank_map({name: update.rank for name, update in found.items()}), len(found)


def _spectra(folders: list[Path], module: str):
    from .. import plots

    found = _updates(folders[0], module)
    return plots.spectra(found), len(found)


def _similarity(folders: list[Path], module: str):
    """Of the modules that both have; of many, some from the first to the last."""
    from .. import plots

    first, second = (_updates(folder, module) for folder in folders)
    both = [name for name in first if name in second]
    if not both:
        raise ValueError(f"{folders[0]} and {folders[1]} have no module in common")
    shown = sorted({round(i * (len(both) - 1) / (SHOWN - 1)) for i in range(SHOWN)})
    phi = {both[i]: subspace_similarity(first[both[i]], second[both[i]]) for i in shown}
    return plots.similarity_grid(phi, *(folder.name for folder in folders)), len(phi)


def _amplification(folders: list[Path], module: str):
    from .. import plots

    found = {n: own for n, own in amplifications(*folders).items() if module in n}
    if not found:
        raise ValueError(f"{folders[0]}: has no module with {module!r} in its name")
    return plots.amplification(found), len(found)


def _history(folders: list[Path], module: str):
    from .. import plots

    history = RankHistory.load(folders[0] / FILE)
    kept = {i: name for i, name in enumerate(history.names) if module in name}
    if not kept:
        raise ValueError(f"{folders[0] / FILE}: has no module with {module!r} in its name")
    events = [replace(e, ranks=tuple(e.ranks[i] for i in kept)) for e in history.events]
    return plots.ranks_over_time(events, kept.values()), len(kept)


_DRAWN = {
    Kind.ranks: _ranks,
    Kind.spectra: _spectra,
    Kind.similarity: _similarity,
    Kind.amplification: _amplification,
    Kind.history: _history,
}
