"""python -m rankwise: what doctor finds, its advice, and what works without typer and rich."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rankwise as rw
from rankwise import doctor
from rankwise._library import library

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "rankwise"]


def test_the_command_prints_what_examine_finds():
    found = doctor.examine()
    result = subprocess.run([*COMMAND, "doctor"], capture_output=True, text=True)
    assert result.returncode == bool(found.problems), result.stderr
    for version in found.versions.values():
        assert version in result.stdout
    for name, (version, _) in found.packages.items():
        assert re.search(rf"{name} .*{version}", result.stdout)
    for problem in found.problems or ["no problems found"]:
        assert problem in result.stdout


def test_the_command_measures_the_paths():
    result = subprocess.run([*COMMAND, "doctor", "--measure"], capture_output=True, text=True)
    if "cpu (micro-kernel)" not in doctor.examine().devices[0].paths.values():
        assert "nothing to choose" in result.stdout
        return
    for call in ("forward", "backward"):
        for tokens, n_in, n_out in doctor.MEASURED:
            assert re.search(
                rf"{call} .* {tokens}, {n_in} -> {n_out}, r 8 .*\d\.\d{{3}}", result.stdout
            )


def test_measuring_leaves_the_path_as_it_was():
    rw.ops.set_cpu_path("ATen")
    doctor.measure()
    assert rw.ops.path(torch.empty(1)) == "cpu (ATen)"


def test_measuring_leaves_the_setting_where_another_path_is_in_effect():
    """Under deterministic algorithms calls take another path than the one that was set."""
    rw.ops.set_cpu_path("measured")
    torch.use_deterministic_algorithms(True)
    try:
        doctor.measure()
    finally:
        torch.use_deterministic_algorithms(False)
    assert rw.ops.path(torch.empty(1)) in ("cpu (measured)", "cpu (ATen)")
    assert str(library.cpu_path()) == "measured"


def test_it_says_which_path_serves_each_device_and_dtype():
    cpu, *others = doctor.examine().devices
    assert cpu.name == "cpu" and len(others) == torch.cuda.device_count()
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        assert cpu.paths[dtype] == rw.ops.path(torch.zeros(1, dtype=getattr(torch, dtype)))


def test_more_threads_than_processors(monkeypatch):
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda pid: {3})
    torch.set_num_threads(2)
    assert doctor.examine().problems == [
        "torch has 2 threads for 1 processors: set OMP_NUM_THREADS or call torch.set_num_threads(1)"
    ]


@pytest.mark.parametrize(
    "cuda, setting",
    [(False, r"RANKWISE_WITH_CUDA=on"), (True, r"RANKWISE_CUDA_ARCHITECTURES of this device")],
)
def test_a_device_without_kernels(monkeypatch, cuda, setting):
    torch.set_num_threads(1)
    monkeypatch.setattr(doctor.ops, "path", lambda tensor: "cuda (composite)")
    monkeypatch.setattr(doctor.library, "cuda", cuda)
    (problem,) = doctor.examine().problems[:1]
    assert re.search(f"is served by PyTorch's operations.*{setting}", problem)


def test_a_package_that_is_not_there(monkeypatch):
    monkeypatch.setitem(doctor.TESTED, "no-such-package", "1.0")
    assert doctor.examine().packages["no-such-package"] == (None, "1.0")


def test_tested_versions_are_those_of_the_requirements():
    pinned = dict(re.findall(r"^([\w-]+)==(.+)$", (ROOT / "requirements.txt").read_text(), re.M))
    assert doctor.TESTED == {name: pinned[name] for name in doctor.TESTED}


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_packages_of_the_command_line(missing):
    def run(argument: str) -> subprocess.CompletedProcess:
        code = (
            f"import runpy, sys; sys.modules[{missing!r}] = None; sys.argv[1:] = [{argument!r}]; "
            "runpy.run_module('rankwise', run_name='__main__', alter_sys=True)"
        )
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    found = run("--cmake-dir")
    assert (Path(found.stdout.strip()) / "rankwise" / "rankwiseConfig.cmake").is_file()
    refused = run("doctor")
    assert (refused.returncode, refused.stderr) == (
        1,
        f"rankwise: commands need {missing}; install it with: pip install typer rich\n",
    )
