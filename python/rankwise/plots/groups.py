"""Modules by layer and projection, as their names tell."""

from __future__ import annotations

from collections.abc import Iterable

from .look import COLORS

ALONE = len(COLORS)  # as many modules are drawn one by one


def place_of(name: str) -> tuple[str, str]:
    """The layer, up to the first number in the name, and the projection after it.

    ``encoder.layer.3.attention.query`` is ``attention.query`` of ``encoder.layer.3``; a name
    without a number is a layer of its own.
    """
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: i + 1]), ".".join(parts[i + 1 :])
    return name, ""


def stem_of(layer: str) -> tuple[str, int]:
    """A layer's name without its number, and the number; -1 where it has none."""
    stem, _, number = layer.rpartition(".")
    return (stem, int(number)) if number.isdecimal() else (layer, -1)


def grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """{label: modules}: each alone where they are few, else by projection, the rarest together."""
    names = list(names)
    if len(names) <= ALONE:
        return {name: [name] for name in names}
    found: dict[str, list[str]] = {}
    for name in names:
        layer, projection = place_of(name)
        found.setdefault(projection or stem_of(layer)[0] or "layers", []).append(name)
    if len(found) <= ALONE:
        return found
    common = sorted(found, key=lambda label: -len(found[label]))[: ALONE - 1]
    rest = [name for label in found if label not in common for name in found[label]]
    return {label: found[label] for label in common} | {f"{len(rest)} others": rest}
