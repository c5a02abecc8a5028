"""make mutate: small faults in the sources, of which the tests must notice at least 90 %.

Mutants (tools/mutation/mutants.py) of the parts in tools/mutation/parts.py are tried one by one in
a copy below build/mutate: a sample of each part and language, drawn by the seed alone, or with
--sample 0 all of them. What was killed is noted there and not tried again while its file stays as
it is. Those that no test can notice, or need not, are in tools/mutation/survivors.json, each with
the reason. Fails where a part is under the goal, another mutant survives, or a reason has become
stale: its mutant is killed, or is no more.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from mutation.mutants import Mutant, language_of, mutants_of
from mutation.parts import PARTS, Part
from mutation.trees import Tree, cpp_tree, python_tree, source_of
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "build" / "mutate"
SURVIVORS = ROOT / "tools" / "mutation" / "survivors.json"
GOAL = 90.0  # percent of a part's mutants
NAME = ("file", "function", "before", "after")


def in_random_order(mutants: Iterable[Mutant], seed: int) -> list[Mutant]:
    """Any first part of the order has the files in proportion to their mutants."""
    files: dict[str, list[Mutant]] = {}
    for mutant in mutants:
        files.setdefault(mutant.file, []).append(mutant)
    order = []
    for file, own in files.items():
        chance = random.Random(f"{seed} {file}")
        chance.shuffle(own)
        first = chance.random()
        order += [((first + i) / len(own), file, mutant) for i, mutant in enumerate(own)]
    return [mutant for *_, mutant in sorted(order, key=lambda entry: entry[:2])]


class Journal:
    """What became of mutants, a JSON object a line.

    It counts as long as their file is the same, and for survivors their tests.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self._known = {self._key(entry): entry for entry in map(json.loads, lines)}

    def outcome(self, mutant: Mutant, source: str, tests: str) -> str | None:
        """Of a mutant of this source under these tests, by their digests; None if not known."""
        known = self._known.get(self._key(self._entry(mutant, source)))
        if known is None or (known["outcome"] == "survived" and known["tests"] != tests):
            return None
        return known["outcome"]

    def add(self, mutant: Mutant, source: str, tests: str, outcome: str, by: str) -> None:
        entry = self._entry(mutant, source) | {"tests": tests, "outcome": outcome, "by": by}
        self._known[self._key(entry)] = entry
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    @staticmethod
    def _entry(mutant: Mutant, source: str) -> dict:
        names = dict(zip(NAME, mutant.name, strict=True))
        return {**names, "start": mutant.start, "text": mutant.text, "source": source}

    @staticmethod
    def _key(entry: dict) -> tuple:
        return tuple(entry[key] for key in ("file", "start", "text", "source"))


def digest(paths: Iterable[Path]) -> str:
    """Of the names and contents of files."""
    whole = hashlib.sha256()
    for path in paths:
        whole.update(f"{path.name} ".encode() + path.read_bytes())
    return whole.hexdigest()[:16]


def try_part(
    part: Part, mutants: Sequence[Mutant], sample: int, tree: Tree, journal: Journal, title: str
) -> dict[Mutant, str]:
    """What became of the first `sample` mutants that compile, or of all."""
    outcomes: dict[Mutant, str] = {}
    rest, wanted = list(mutants), sample or len(mutants)
    with tqdm(total=min(wanted, len(rest)), desc=title) as bar:
        while rest and (missing := wanted - len(outcomes)) > 0:
            chosen, rest = rest[:missing], rest[missing:]
            for mutant in sorted(chosen, key=lambda m: (m.file, m.start)):  # one file after another
                tests = part[mutant.file]
                digests = (
                    digest([tree.sources / mutant.file]),
                    digest(tree.checkout / source_of(test) for test in tests),
                )
                outcome = journal.outcome(mutant, *digests)
                if outcome is None:
                    outcome, by = tree.try_out(mutant, tests)
                    journal.add(mutant, *digests, outcome, by)
                if outcome != "invalid":
                    outcomes[mutant] = outcome
                    bar.update()
    return outcomes


def judge(
    outcomes: dict[Mutant, str], explained: dict[tuple, str], existing: set[tuple], title: str
) -> list[str]:
    """What is wrong with the outcomes of a part, after a table's row for it."""
    counts = Counter(outcomes.values())
    share = 100 * counts["killed"] / max(len(outcomes), 1)
    survived = {mutant.name for mutant, outcome in outcomes.items() if outcome == "survived"}
    reasons = Counter(explained[name].split(":")[0] for name in survived & explained.keys())
    print(f"{title:20} {len(outcomes):5} mutants  {share:5.1f} % killed ", dict(reasons) or "")
    wrong = [f"{title}: {share:.1f} % killed, wanted {GOAL:.0f} %"] if share < GOAL else []
    killed = {mutant.name for mutant, outcome in outcomes.items() if outcome == "killed"}
    wrong += [f"survived: {_line(name)}" for name in sorted(survived - explained.keys())]
    stale = explained.keys() & (killed - survived)
    wrong += [f"explained, but killed: {_line(name)}" for name in sorted(stale)]
    gone = explained.keys() - existing
    return wrong + [f"explained, but no mutant: {_line(name)}" for name in sorted(gone)]


def _line(name: tuple[str, ...]) -> str:
    file, function, before, after = name
    return f"{file}, {function}:\n    {before}\n    {after}"


def explanations(path: Path) -> dict[tuple, str]:
    """{a mutant's name: why it survives}."""
    return {tuple(e[key] for key in NAME): e["why"] for e in json.loads(path.read_text())}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, nargs="*", default=list(PARTS))
    languages = ("cpp", "python")
    parser.add_argument("--language", choices=languages, nargs="*", default=languages)
    parser.add_argument("--sample", type=int, default=25, help="of a part; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started ends too
    explained, wrong = explanations(SURVIVORS), []
    for language in arguments.language:
        journal = Journal(OUTPUT / f"{language}.jsonl")
        alone = (OUTPUT / f"{language}.lock").open("w")
        fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError where another runs
        parts = {
            name: {f: tests for f, tests in part.items() if language_of(f) == language}
            for name, part in PARTS.items()
        }
        if language == "cpp":
            tree = cpp_tree(ROOT, OUTPUT / "cpp")
        else:
            tree = python_tree(ROOT, OUTPUT / "python")
        for name in arguments.part:
            part, title = parts[name], f"{name}, {language}"
            sources = {file: (tree.sources / file).read_bytes() for file in part}
            mutants = [m for file in part for m in mutants_of(file, sources[file])]
            own = {key: why for key, why in explained.items() if key[0] in part}
            order = in_random_order(mutants, arguments.seed)
            outcomes = try_part(part, order, arguments.sample, tree, journal, title)
            wrong += judge(outcomes, own, {mutant.name for mutant in mutants}, title)
    print(*wrong, sep="\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
