# A save that is killed at any of its system calls leaves the old checkpoint or the new one, whole.
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SYSTEM_CALLS = HERE.parents[1] / "cpp" / "io" / "system_calls.cpp"

# The parent loads what its child, killed at one more call each time, left in the folder.
SCRIPT = """
import ctypes, os, sys
import torch
from checkpoint_trainings import Run, same
torch.set_num_threads(1)
folder, killed = sys.argv[1], 77
kill_at = ctypes.CDLL(os.environ["LD_PRELOAD"])["_ZN12system_calls7kill_atEi"]
for method in sys.argv[2:]:
    run, other, states = Run(method, "adamw"), Run(method, "adamw", seed=99), {}
    for step in (4, 9):
        run.train(range(step - 5, step))
        run.save(f"{folder}/{method}-{step}", step)
        states[step] = run.state()
    found, at, status = {4: 0, 9: 0}, 0, killed
    while status == killed:
        at += 1
        target = f"{folder}/{method}-{at}-killed"
        run.load(f"{folder}/{method}-4")
        run.save(target, 4)
        run.load(f"{folder}/{method}-9")
        child = os.fork()
        if child == 0:
            kill_at(at)
            run.save(target, 9)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        step = other.load(target)
        assert same(other.state(), states[step]), at
        found[step] += 1
        other.save(target, 4)
        assert len(os.listdir(target)) == 4, at
    assert status == 0
    print(found[4], found[9])
"""


@pytest.fixture(scope="module")
def system_calls(tmp_path_factory) -> Path:
    library = tmp_path_factory.mktemp("calls") / "system_calls.so"
    command = ["g++", "-std=c++20", "-shared", "-fPIC", "-o", library, SYSTEM_CALLS]
    subprocess.run(command, check=True)
    return library


def test_kill_at_every_call(system_calls, tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path, "adalora", "spectral"],
        env=os.environ | {"LD_PRELOAD": str(system_calls)},
        cwd=HERE,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    for line in result.stdout.splitlines():
        olds, news = map(int, line.split())
        assert olds > 20 and news > 8
