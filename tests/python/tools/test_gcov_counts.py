"""tools/gcov_counts.py: what it counts of a program that g++ compiled to count."""

import json
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parents[3] / "tools" / "gcov_counts.py"
HEADER = """\
#include <string>
template <class T>
bool positive(T x) {
  if (x > 0) return true;
  return false;
}
std::string text_of(int x);
"""
SOURCE = """\
#include "sign.h"
struct Guard {
  ~Guard() { text_of(1); }
};
std::string text_of(int x) {
  Guard guard;
  if (x > 9) return std::string("large");
  return std::to_string(x);
}
int unused() {
  return 1;
}
"""
MAIN = """\
#include "sign.h"
int main(int count, char**) {
  static const std::string none;
  if (positive(count) && !positive(-1.5)) return 0;
  return text_of(count).size();
}
"""


def counts(folder: Path, sources: dict[str, str]) -> dict:
    """The tool's report on csrc of a program of these sources, built and run once."""
    csrc, build = folder / "csrc", folder / "build"
    csrc.mkdir()
    build.mkdir()
    for name, text in {"sign.h": HEADER, **sources}.items():
        (csrc / name).write_text(text)
        if name.endswith(".cpp"):
            command = ["g++", "--coverage", "-O0", "-c", csrc / name, "-o", f"{name}.o"]
            subprocess.run(command, cwd=build, check=True)
    objects = [f"{name}.o" for name in sources]
    subprocess.run(["g++", "--coverage", *objects, "-o", "program"], cwd=build, check=True)
    subprocess.run(build / "program", check=True)
    command = [sys.executable, TOOL, build, csrc]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_decisions_are_counted_and_calls_are_not(tmp_path):
    report = counts(tmp_path, {"sign.cpp": SOURCE, "main.cpp": MAIN})
    files = {file.pop("filename"): tuple(file.values()) for file in report["files"]}
    assert files == {
        "csrc/main.cpp": (4, 3, 6, 3),  # two conditions and what follows from both, one way each
        "csrc/sign.cpp": (7, 0, 2, 0),  # nothing of it ran; neither calls nor ~Guard() are counted
        "csrc/sign.h": (3, 3, 2, 2),  # the two instances as one: one said yes, the other no
    }
    keys = ("line_total", "line_covered", "branch_total", "branch_covered")
    assert {key: report[key] for key in keys} == dict(zip(keys, (14, 6, 10, 5), strict=True))
