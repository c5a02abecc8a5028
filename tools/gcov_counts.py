"""make coverage: which lines and branches of csrc ran, from g++'s counts, as JSON.

A branch is a way that the source decides on. What a call adds (to return, or to leave by an
exception) is none, nor what g++ puts on lines without a name, as destructors behind a brace, and
on those of static variables, as their locks.
gcovr leaves out only the exceptional way of a call, and of those alone that ran.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

Ways = tuple[int, ...]  # how often each branch of a line was taken, in the compiler's order


def counted(notes: list[Path]) -> Iterator[dict]:
    """gcov's report on each object file that was compiled to count."""

    def report(path: Path) -> str:
        command = ["gcov", "--json-format", "--stdout", "--branch-probabilities", path]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    with ThreadPoolExecutor(2) as workers:
        for text in workers.map(report, notes):
            yield from (json.loads(line) for line in text.splitlines() if line)


def decided(branches: list[dict]) -> Ways:
    """Without calls: a way that throws comes right behind the one that returns."""
    ways = []
    for branch in branches:
        if branch["throw"]:
            ways.pop()
        else:
            ways.append(branch["count"])
    return tuple(ways)


class Line:
    """Over all object files; instances of a template count as one, by the ways that they have."""

    def __init__(self) -> None:
        self.count = 0
        self.ways: dict[int, Ways] = {}

    def add(self, count: int, ways: Ways) -> None:
        self.count += count
        before = self.ways.get(len(ways), (0,) * len(ways))
        self.ways[len(ways)] = tuple(map(sum, zip(before, ways, strict=True)))


def lines_of(notes: list[Path], sources: Path) -> dict[str, dict[int, Line]]:
    files: dict[str, dict[int, Line]] = defaultdict(lambda: defaultdict(Line))
    for report in counted(notes):
        for file in report["files"]:
            path = Path(report["current_working_directory"], file["file"])
            if not path.is_relative_to(sources):
                continue
            name = str(path.relative_to(sources.parent))
            text = path.read_text().splitlines()
            for line in file["lines"]:
                source = text[line["line_number"] - 1].strip()
                decides = any(map(str.isalnum, source)) and not source.startswith("static ")
                ways = decided(line["branches"]) if decides else ()
                files[name][line["line_number"]].add(line["count"], ways)
    return files


def summary(lines: dict[int, Line]) -> dict[str, int]:
    ways = [count for line in lines.values() for of in line.ways.values() for count in of]
    return {
        "line_total": len(lines),
        "line_covered": sum(line.count > 0 for line in lines.values()),
        "branch_total": len(ways),
        "branch_covered": sum(count > 0 for count in ways),
    }


def main(build: str, sources: str) -> None:
    files = lines_of(sorted(Path(build).rglob("*.gcno")), Path(sources).resolve())
    entries = [{"filename": name, **summary(lines)} for name, lines in sorted(files.items())]
    whole = {key: sum(entry[key] for entry in entries) for key in summary({})}
    print(json.dumps({**whole, "files": entries}))


if __name__ == "__main__":
    main(*sys.argv[1:])
