# Lets the tests import tests/bench and tools/gpu, and runs the latter's commands without processes.
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path += [str(ROOT / "tests"), str(ROOT / "tools")]

from gpu.stages import Stages  # noqa: E402


class Runner:
    """In the place of processes: each command takes `seconds` on a clock of its own."""

    def __init__(self, seconds: float = 10.0):
        self.now, self.seconds, self.commands = 0.0, seconds, []
        self.codes: dict[str, int | None] = {}
        self.logs: dict[str, str] = {}

    def clock(self) -> float:
        return self.now

    def __call__(self, command, log: Path, limit: float, env) -> int | None:
        name = log.stem
        self.commands.append((name, list(command), limit))
        self.now += min(self.seconds, limit)
        log.write_text(self.logs.get(name, ""))
        return self.codes.get(name, 0)

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self.commands]


@pytest.fixture
def runner():
    return Runner()


@pytest.fixture
def stages(runner, tmp_path):
    return Stages(tmp_path, runner.clock, runner)
