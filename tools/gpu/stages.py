# How the time of make gpu is divided, and how its commands run: each ends by its limit, none of
# them ends the others.
from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / "build" / "gpu"
SITE = OUTPUT / "site"  # the installed package
LEAST = 5.0  # seconds: nothing begins with less
PATIENCE = 15.0  # seconds in which an interrupted command writes what it has

Environment = Mapping[str, str]
Clock = Callable[[], float]


class Budget:
    """Seconds that are divided by weights among what comes, in its order.

    What one leaves of its part is there for all that follow.
    """

    def __init__(self, seconds: float, weights: Mapping[str, float], clock: Clock = time.monotonic):
        self.clock, self.end = clock, clock() + seconds
        self.weights = dict(weights)

    def left(self) -> float:
        return max(0.0, self.end - self.clock())

    def of(self, name: str) -> float:
        """Of `name`, when all before it has run."""
        names = list(self.weights)
        coming = names[names.index(name) :]
        return self.left() * self.weights[name] / sum(self.weights[n] for n in coming)


@dataclass(frozen=True)
class Stage:
    """What became of one command: "passed", "failed with N", "stopped after N s" or "left out"."""

    name: str
    result: str
    seconds: float
    note: str  # the log, or why it was left out

    @property
    def failed(self) -> bool:
        return self.result not in ("passed", "left out")


def run_process(command: Sequence[str], log: Path, limit: float, env: Environment) -> int | None:
    """The exit status, or None for one that was stopped.

    It is interrupted first, so that it writes its reports; then its whole group is killed.
    """
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                pass
        finally:
            _kill_group(process)
    return None


def _kill_group(process: subprocess.Popen) -> None:
    """Workers outlive what started them when a device does not answer."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


class Stages:
    """Runs commands and keeps what became of them; the logs are in `output`."""

    def __init__(self, output: Path = OUTPUT, clock: Clock = time.monotonic, run=run_process):
        self.output, self.clock, self._run = output, clock, run
        self.done: list[Stage] = []

    def run(self, name: str, command: Sequence[str], limit: float, env: Environment) -> bool:
        if limit < LEAST:
            return self.leave_out(name, "no time was left for it")
        print(f"{name}, for at most {limit:.0f} s ...", flush=True)
        log, begin = self.log(name), self.clock()
        code = self._run(command, log, limit, env)
        if code is None:
            result = f"stopped after {limit:.0f} s"
        else:
            result = f"failed with {code}" if code else "passed"
        stage = Stage(name, result, self.clock() - begin, str(log))
        self.done.append(stage)
        if stage.failed and log.exists():
            print(*log.read_text(errors="replace").splitlines()[-25:], sep="\n", flush=True)
        return not stage.failed

    def leave_out(self, name: str, reason: str) -> bool:
        self.done.append(Stage(name, "left out", 0.0, reason))
        print(f"{name}: left out, {reason}", flush=True)
        return False

    def fail(self, name: str, reason: str) -> None:
        """Of a stage that found by itself that something is wrong."""
        self.done.append(Stage(name, f"failed: {reason}", 0.0, ""))

    def log(self, name: str) -> Path:
        return self.output / f"{name.replace(' ', '_')}.log"

    def rows(self) -> list[str]:
        return [f"{s.name:18} {s.seconds:6.1f} s  {s.result}{_of(s)}" for s in self.done]

    def as_json(self) -> list[dict]:
        return [asdict(stage) for stage in self.done]


def _of(stage: Stage) -> str:
    if stage.result == "left out":
        return f": {stage.note}"
    return f"  {Path(stage.note).name}" if stage.failed and stage.note else ""
