"""Every kernel has a small problem for compute-sanitizer, and every problem computes something."""

import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
sys.path.append(str(ROOT / "tests" / "python" / "cuda"))

import small_problems  # noqa: E402
from small_problems import PROBLEMS, Problem  # noqa: E402

KERNEL = re.compile(
    r"__global__\s+void\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\s*\("
)
ASKED_ALONE = {"probe_kernel"}  # device_support.cu asks for its attributes


def kernels_of(source: str) -> list[str]:
    names = KERNEL.findall(source)
    assert len(names) == source.count("__global__"), f"of {source.count('__global__')}: {names}"
    return names


def test_how_a_kernel_is_written():
    source = """
        template <typename T> __global__ void one(T* out) {}
        __global__ void __launch_bounds__(Plan<T, 3>::threads(2), 2)
            another(int n) {}
    """
    assert kernels_of(source) == ["one", "another"]


def test_every_kernel_is_launched_by_a_problem():
    sources = "\n".join(p.read_text() for p in (ROOT / "csrc" / "kernels").rglob("*.cu"))
    declared = set().union(*(problem.kernels for problem in PROBLEMS.values()))
    assert declared == set(kernels_of(sources)) - ASKED_ALONE


def test_the_kernel_that_is_asked_alone_is_not_launched():
    sources = [p.read_text() for p in (ROOT / "csrc").rglob("*.c*") if p.is_file()]
    for name in ASKED_ALONE:
        assert not any(re.search(rf"launch\w*\({name}|{name}<<<", source) for source in sources)


def tensors(results) -> list[torch.Tensor]:
    if isinstance(results, torch.Tensor):
        return [results]
    return [tensor for result in results for tensor in tensors(result)]


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems_run(name):
    found = tensors(PROBLEMS[name].run("cpu"))
    assert found and all(t.isfinite().all() for t in found if t.is_floating_point())
    assert any(t.any() for t in found)


def raises(error: Exception) -> Problem:
    def run(device: str) -> None:
        raise error

    return Problem(run, frozenset())


@pytest.fixture
def four(monkeypatch):
    """Problems of which the second fails, the third loses the device, and one wants another."""
    good = Problem(lambda device: torch.ones(1), frozenset())
    problems = {
        "good": good,
        "fails": raises(ValueError("of the second")),
        "loses": raises(torch.AcceleratorError("an illegal memory access")),
        "elsewhere": Problem(good.run, frozenset(), path="cuda (sm_90a)"),
        "last": good,
    }
    monkeypatch.setattr(small_problems, "PROBLEMS", problems)

    def ends(status):
        raise SystemExit(status)

    monkeypatch.setattr(small_problems.os, "_exit", ends)


def test_a_process_ends_with_its_device_alone(four, capsys):
    with pytest.raises(SystemExit) as end:
        small_problems.main(None, "cpu")
    assert end.value.code == 1
    captured = capsys.readouterr()
    said = ["begin good", "end good", "begin fails", "end fails", "begin loses"]
    assert captured.out.splitlines() == said
    assert "of the second" in captured.err and "an illegal memory access" in captured.err


def test_the_problems_behind_one_are_run(four, capsys):
    assert small_problems.main("loses", "cpu") == 0
    assert capsys.readouterr().out.splitlines() == [
        "left out elsewhere: it needs cuda (sm_90a)",
        "begin last",
        "end last",
        "all problems have begun",
    ]


def test_a_failure_is_the_status(four, capsys):
    del small_problems.PROBLEMS["loses"]
    assert small_problems.main(None, "cpu") == 1
    assert "all problems have begun" in capsys.readouterr().out
