"""Where an adapter's tensors belong in a model's folder: by name, with or without a prefix."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from .files import FileError
from .model_folder import ModelFolder, StoredTensor

_Shift = tuple[str, str]  # the prefix that names lose, the one they get
UNTIED = "save the model with a weight for each, and tie_word_embeddings false in its config.json"


def places_of(wanted: Collection[str], folder: ModelFolder) -> dict[str, str]:
    """{the adapter's name of a tensor: the folder's}, also where the folder has no such tensor.

    The names are the folder's, or all of them have, or lack, one prefix: "bert." in an adapter of a
    model with a head, over the folder of one without. Else the prefix that fits most is taken.

    Raises:
        FileError: several prefixes fit.
    """
    if folder.tensors.keys() >= set(wanted):
        return {name: name for name in wanted}
    known = set(folder.tensors).union(*folder.ties or [])
    shifts = [("", ""), *sorted(_shifts(set(wanted), known))]
    missing = {s: sum(_shifted(name, s) not in known for name in wanted) for s in shifts}
    best = min(shifts, key=missing.__getitem__)
    fitting = [shift for shift in shifts if missing[shift] == 0]
    if best != ("", "") and len(fitting) > 1:
        texts = " and ".join(f"{got or lost!r}" for lost, got in fitting[:2])
        raise FileError(f"{folder.path}: the adapter fits with several prefixes: {texts}")
    return {name: _shifted(name, best) or name for name in wanted}


def _shifts(wanted: Collection[str], known: Collection[str]) -> set[_Shift]:
    got = {("", start) for name in known for start, rest in _starts(name) if rest in wanted}
    lost = {(start, "") for name in wanted for start, rest in _starts(name) if rest in known}
    return got | lost


def _starts(name: str) -> Iterable[tuple[str, str]]:
    """("a.", "b.c") and ("a.b.", "c") of "a.b.c"."""
    return ((name[: i + 1], name[i + 1 :]) for i, letter in enumerate(name) if letter == ".")


def _shifted(name: str, shift: _Shift) -> str:
    """Nothing of a name without the prefix to lose."""
    lost, got = shift
    return got + name.removeprefix(lost) if name.startswith(lost) else ""


def stored_at(place: str, folder: ModelFolder) -> StoredTensor | None:
    """What a model that is loaded has there: of a tie one name may stand for all."""
    if place in folder.tensors:
        return folder.tensors[place]
    group = next((group for group in folder.ties or [] if place in group), ())
    return next((folder.tensors[name] for name in group if name in folder.tensors), None)


def problems_of_ties(changed: Mapping[str, Tensor | None], folder: ModelFolder) -> dict[str, str]:
    """{the folder's name: what is wrong} where a change would reach what is to stay.

    Args:
        changed: {the folder's name: what takes the tensor's place, None for an update}.
    """
    if not any(_may_be_tied(place, folder) for place in changed):
        return {}
    if folder.ties is None:
        unsure = [place for place in changed if _may_be_tied(place, folder)]
        return dict.fromkeys(
            unsure,
            "may be one parameter with another, which transformers' class of the model would tell "
            'but cannot be made; if it is none, add "tie_word_embeddings": false to config.json',
        )
    problems = {}
    for group in folder.ties:
        values = [changed.get(place) for place in group]
        alike = all(v is not None and torch.equal(v, values[0]) for v in values)
        for place in () if alike else group & changed.keys():
            others = ", ".join(sorted(group - {place}))
            problems[place] = f"is one parameter with {others}, which would change too; {UNTIED}"
    return problems


def _may_be_tied(place: str, folder: ModelFolder) -> bool:
    """Transformers ties vocabularies' weights alone."""
    stored = folder.tensors.get(place)
    return stored is None or not _vocabulary_sizes(folder.config).isdisjoint(stored.shape[:1])


def _vocabulary_sizes(config: Mapping) -> set[int]:
    sizes = {config["vocab_size"]} if isinstance(config.get("vocab_size"), int) else set()
    inner = [value for value in config.values() if isinstance(value, dict)]
    return sizes.union(*map(_vocabulary_sizes, inner))
