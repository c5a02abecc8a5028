"""Processes that are ended after a time, with all that they started: commands, and pytest."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

MEMORY = 8 << 30  # bytes of data that a process may hold: a mutant may ask for any
# Forks of a process that has these already need not import them, for each mutant anew.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["torch", "torch._dynamo", "transformers", "peft", "hypothesis", "pytest"]
)
Outcome = tuple[str, str]  # "passed", "failed" or "timeout", and what was printed


def run(command: Sequence[object], limit: float, **how) -> Outcome:
    """What became of a command, which may take `limit` seconds; `how` is Popen's."""
    with TemporaryFile() as output:
        process = subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_limit_memory, **how,
        )  # fmt: skip
        with _ended(process.pid):
            with suppress(subprocess.TimeoutExpired):
                process.wait(limit)
            status = process.returncode
        process.wait()
        return _outcome(status, output)


def run_pytest(
    options: Sequence[str], limit: float, folder: Path, environment: Mapping[str, str]
) -> Outcome:
    """The same for pytest in a folder, with PYTHONPATH from the environment first."""
    with TemporaryFile() as output:
        # The file goes to the fork by its name, for it is no child of this process.
        place = f"/proc/{os.getpid()}/fd/{output.fileno()}"
        arguments = (list(options), str(folder), dict(environment), place)
        process = _FORKS.Process(target=_pytest, args=arguments)
        process.start()
        with _ended(process.pid):
            process.join(limit)
            status = process.exitcode
        return _outcome(status, output)


def _pytest(options: list[str], folder: str, environment: dict[str, str], output: str) -> None:
    os.setsid()
    with open(output, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    _limit_memory()
    os.chdir(folder)
    os.environ.update(environment)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.dont_write_bytecode = True
    import pytest

    sys.exit(int(pytest.main(options)))


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))


@contextmanager
def _ended(session: int) -> Iterator[None]:
    """Ends a session after the block, whatever ends that."""
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(session, signal.SIGKILL)


def _outcome(status: int | None, output) -> Outcome:
    output.seek(0)
    text = output.read().decode(errors="replace")
    return {None: "timeout", 0: "passed"}.get(status, "failed"), text
