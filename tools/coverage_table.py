"""make coverage: what clang and coverage.py counted, and the files with the most lines not run.

Fails where less of csrc is run than the goals say.
"""

from __future__ import annotations

import json
import sys
from dataclasses import astuple, dataclass
from pathlib import Path

GOALS = {"lines": 95.0, "branches": 85.0}  # of csrc, percent
WORST = 10


@dataclass(frozen=True)
class Counts:
    """Lines and branches of a file or of a whole tree: how many there are, and were run."""

    name: str
    lines: int
    lines_run: int
    branches: int
    branches_run: int

    def share(self, kind: str) -> float:
        """Percent of "lines" or "branches"."""
        total, run = getattr(self, kind), getattr(self, f"{kind}_run")
        return 100 * run / total if total else 100.0

    def row(self) -> str:
        parts = [
            f"{self.share(kind):6.1f} % of {getattr(self, kind):6} {kind}"
            for kind in ("lines", "branches")
        ]
        return "  ".join((f"{self.name:50}", *parts))


def of_clang(path: Path, root: Path) -> tuple[Counts, list[Counts]]:
    """The whole of root/csrc and its files, from the summary that llvm-cov exports."""
    (report,) = json.loads(path.read_text())["data"]
    files = []
    for entry in report["files"]:
        name = Path(entry["filename"])
        if name.is_relative_to(root / "csrc"):
            of = entry["summary"]
            counts = (of[kind][key] for kind in GOALS for key in ("count", "covered"))
            files.append(Counts(str(name.relative_to(root)), *counts))
    sums = (sum(column) for column in zip(*(astuple(file)[1:] for file in files), strict=True))
    return Counts("csrc", *sums), files


def of_coverage(path: Path) -> tuple[Counts, list[Counts]]:
    """The whole and its files, from coverage.py's JSON report."""

    def counts(name: str, entry: dict) -> Counts:
        keys = ("num_statements", "covered_lines", "num_branches", "covered_branches")
        return Counts(name, *(entry[key] for key in keys))

    report = json.loads(path.read_text())
    files = [
        counts("python/rankwise/" + name.split("/rankwise/")[-1], entry["summary"])
        for name, entry in report["files"].items()
    ]
    return counts("python/rankwise", report["totals"]), files


def main(cpp: str, python: str, root: str) -> int:
    csrc, cpp_files = of_clang(Path(cpp), Path(root))
    whole, python_files = of_coverage(Path(python))
    for total, files in ((csrc, cpp_files), (whole, python_files)):
        print(total.row())
        worst = sorted(files, key=lambda file: file.lines_run - file.lines)[:WORST]
        print(*("  " + file.row() for file in worst if file.lines_run < file.lines), sep="\n")
    missed = [kind for kind, goal in GOALS.items() if csrc.share(kind) < goal]
    for kind in missed:
        print(f"csrc: {csrc.share(kind):.1f} % of {kind} are run, wanted {GOALS[kind]:.0f} %")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
