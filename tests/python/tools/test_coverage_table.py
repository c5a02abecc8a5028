"""tools/coverage_table.py: its table, and that it fails under the goals."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def of_clang(name: str, lines: int, branches: int) -> dict:
    """llvm-cov's entry for a file of 100 lines and 50 branches."""
    summary = {
        "lines": {"count": 100, "covered": lines}, "branches": {"count": 50, "covered": branches}
    }  # fmt: skip
    return {"filename": name, "summary": summary}


def of_coverage(lines: int) -> dict:
    return {
        "num_statements": 50, "covered_lines": lines, "num_branches": 0, "covered_branches": 0
    }  # fmt: skip


def table(folder: Path, lines: int, branches: int) -> subprocess.CompletedProcess:
    files = [
        of_clang(f"{folder}/csrc/io/a.cpp", 100, 50),
        of_clang(f"{folder}/csrc/io/b.cpp", lines - 100, branches - 50),
        of_clang("/torch/include/ATen/Tensor.h", 1, 1),
    ]
    cpp, python = folder / "cpp.json", folder / "python.json"
    cpp.write_text(json.dumps({"data": [{"files": files}]}))
    modules = {"/any/rankwise/ops.py": {"summary": of_coverage(45)}}
    python.write_text(json.dumps({"totals": of_coverage(45), "files": modules}))
    command = [sys.executable, ROOT / "tools" / "coverage_table.py", cpp, python, folder]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    "lines, branches, missed",
    [
        (190, 85, []),
        (189, 85, ["csrc: 94.5 % of lines are run, wanted 95 %"]),
        (190, 84, ["csrc: 84.0 % of branches are run, wanted 85 %"]),
    ],
)
def test_the_goals(lines, branches, missed, tmp_path):
    done = table(tmp_path, lines, branches)
    assert done.returncode == bool(missed), done.stderr
    printed = done.stdout.splitlines()
    rows = [line.split("%")[0].split() for line in printed[:4]]
    assert rows == [
        ["csrc", f"{lines / 2:.1f}"],
        ["csrc/io/b.cpp", f"{lines - 100:.1f}"],
        ["python/rankwise", "90.0"],
        ["python/rankwise/ops.py", "90.0"],
    ]
    assert printed[4:] == missed
