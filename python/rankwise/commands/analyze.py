"""`rankwise analyze`: the spectra of an adapter's updates, and what two adapters share."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..analysis import delta_spectrum, effective_ranks, subspace_similarity, updates
from .output import AsJson, answer, table


def analyze(
    folder: Annotated[Path, typer.Argument(help="A PEFT folder, of LoRA or AdaLoRA.")],
    other: Annotated[
        Path | None, typer.Argument(help="Another one, such as of another seed or rank.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """How many directions of each update matter.

    Its norm, and its effective ranks: entropy, stable, and the fewest directions with 90, 95 and
    99 % of the energy. With another folder phi(i, i) of the input's directions, for i of 1 and of
    the smaller rank: 1 where both share them all.
    """
    found = updates(folder)
    others = updates(other) if other is not None else {}
    modules = {name: _module(update, others.get(name)) for name, update in found.items()}
    columns = ["module", "rank", "norm", "entropy", "stable", "90 %", "95 %", "99 %"]
    shown = table(*columns, *(["phi(1, 1)", "phi(r, r)"] if others else []))
    for name, own in modules.items():
        row = [name, str(own["rank"]), f"{own['norm']:.4g}", f"{own['entropy']:.2f}",
               f"{own['stable']:.2f}"]  # fmt: skip
        row += [str(own[f"energy_{part}"]) for part in (90, 95, 99)]
        if others:
            row += [_share(own["shared_first"]), _share(own["shared_all"])]
        shown.add_row(*row)
    answer({"modules": modules}, as_json, shown)


def _module(update, other) -> dict:
    spectrum = delta_spectrum(update).S
    own = {"rank": update.rank, "norm": spectrum.norm().item(), **asdict(effective_ranks(spectrum))}
    own["singular_values"] = spectrum.tolist()
    if other is not None:
        phi = subspace_similarity(update, other)
        least = min(phi.shape)
        own["shared_first"] = phi[0, 0].item() if least else None
        own["shared_all"] = phi[least - 1, least - 1].item() if least else None
    else:
        own["shared_first"] = own["shared_all"] = None
    return own


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
