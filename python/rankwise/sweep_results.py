"""A file of outcomes, one line each, so that what was stopped goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path


class SweepResults:
    """{setting: outcome}, both dicts of JSON's values, kept in memory and appended to a file.

    Lines that are no outcome, such as the half of one, are passed over. Of a setting with several
    the last counts.

    Args:
        path: created with its folder; None for memory alone.
    """

    def __init__(self, path: str | os.PathLike | None = None) -> None:
        self._path = None if path is None else Path(path)
        self._known: dict[str, dict] = {}
        if self._path is not None and self._path.exists():
            for line in self._path.read_text(errors="replace").splitlines():
                self._note(line)

    def __len__(self) -> int:
        return len(self._known)

    def get(self, setting: Mapping) -> dict | None:
        return self._known.get(_key(setting))

    def add(self, setting: Mapping, outcome: Mapping) -> None:
        """Written when it returns."""
        self._known[_key(setting)] = dict(outcome)
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"setting": dict(setting), "outcome": dict(outcome)}, allow_nan=False)
        with self._path.open("a+b") as file:
            if file.tell() > 0 and not _ends_a_line(file):
                line = "\n" + line
            file.write(f"{line}\n".encode())

    def _note(self, line: str) -> None:
        try:
            row = json.loads(line)
            self._known[_key(row["setting"])] = dict(row["outcome"])
        except (ValueError, TypeError, KeyError):
            return


def _key(setting: Mapping) -> str:
    return json.dumps(dict(setting), sort_keys=True)


def _ends_a_line(file) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
