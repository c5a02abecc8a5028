"""Runs functions one after the other in the same processes, which take long to start."""

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from processes import run_processes


def failures_of(cases: Sequence[Callable], world_size: int, folder: Path) -> dict[str, str]:
    """{name of a function(rank): what it raised, "" for nothing}, of those that began."""
    try:
        run_processes(_run, world_size, list(cases), str(folder))
    except TimeoutError as error:
        (folder / "hangs").write_text(str(error))
    texts: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        name = path.name.partition(".")[0]
        texts[name] = texts.get(name, "") + path.read_text()
    return texts


def _run(rank: int, cases: list[Callable], folder: str) -> None:
    for case in cases:
        path = Path(folder) / f"{case.__name__}.{rank}"
        path.write_text("did not end\n")
        try:
            case(rank)
            path.write_text("")
        except Exception:
            path.write_text(traceback.format_exc())
