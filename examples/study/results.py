"""Outcomes of trainings in a file of one line each, so that a study that was stopped goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path


class Results:
    """{key: outcome}, made where it is not known."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._known: dict[tuple, dict] = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            row = json.loads(line)
            self._known[tuple(row["key"])] = row["outcome"]

    def outcome(self, key: tuple, make: Callable[[], dict]) -> dict:
        """Known, or of a training that is made now."""
        if key not in self._known:
            line = json.dumps({"key": key, "outcome": make()})
            with self._path.open("a") as file:
                file.write(line + "\n")
            self._known[key] = json.loads(line)["outcome"]
        return self._known[key]
