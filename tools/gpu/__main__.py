# The entry: python -m gpu [build|test|measure|all], in the folder tools.
"""make gpu in three parts, which together end in less than ten minutes.

Needs a CUDA device, nvcc, and a Python with torch, pip, setuptools, cmake, ninja, pytest, numpy; no
network. Everything is written to build/gpu: a log for each command, and report.json (of one part
alone build.json, test.json or measure.json). The table comes last, in 8,000 characters.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path

from . import build, measure, test
from .stages import OUTPUT, SITE, Budget, Stages
from .tables import table

# What each has in ten minutes, alone as in all; in all, what one leaves is there for the next.
WEIGHTS = {"build": 4, "test": 4, "measure": 3}
WHOLE = 570.0  # seconds


def build_part(stages: Stages, seconds: float, architecture: str) -> dict:
    return build.build(stages, seconds, architecture)


def test_part(stages: Stages, seconds: float, architecture: str) -> dict:
    return test.test(stages, seconds)


def measure_part(stages: Stages, seconds: float, architecture: str) -> dict:
    return measure.measure(stages, seconds)


PARTS: dict[str, Callable[[Stages, float, str], dict]] = {
    "build": build_part, "test": test_part, "measure": measure_part
}  # fmt: skip


def parser() -> ArgumentParser:
    result = ArgumentParser(
        prog="python -m gpu", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    result.add_argument("part", nargs="?", choices=(*PARTS, "all"), default="all")
    result.add_argument("--seconds", type=float, help=f"for all (default {WHOLE:.0f}), or one part")
    architecture = "to build for, as 90 (default that of the device): a build to be carried"
    result.add_argument("--architecture", default="", help=architecture)
    return result


def run(
    part: str, seconds: float | None, architecture: str, stages: Stages, site: Path = SITE
) -> dict:
    """What the parts found. One that fails does not end the others, but there must be a build."""
    names = list(PARTS) if part == "all" else [part]
    share = WHOLE if part == "all" else WHOLE * WEIGHTS[part] / sum(WEIGHTS.values())
    budget = Budget(seconds or share, {name: WEIGHTS[name] for name in names}, stages.clock)
    report: dict = {}
    if "build" not in names and (reasons := build.refusals(site, build.wanted(architecture))):
        stages.fail("build", "; ".join(reasons))
        report["build"] = {"usable": False, "refused": reasons}
    for name in names:
        if not report.get("build", {"usable": True})["usable"]:
            stages.leave_out(name, "there is no build")
            continue
        try:
            report[name] = PARTS[name](stages, budget.of(name), architecture)
        except Exception as error:  # noqa: BLE001
            stages.fail(name, f"{type(error).__name__}: {error}")
            report.setdefault(name, {"usable": False, "refused": []} if name == "build" else {})
    return report


def sections(report: dict, stages: Stages) -> dict[str, list[str]]:
    found = {"Stages": stages.rows()}
    if "build" in report:
        found["Build"] = build.rows(report["build"])
    if "test" in report:
        found["Tests"] = test.rows(report["test"])
    return found | measure.rows(report.get("measure", {}))


def machine() -> dict[str, str]:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    versions = {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
    return {"device": device, **versions, "python": sys.version.split()[0]}


def main(given: Sequence[str], output: Path = OUTPUT) -> int:
    options = parser().parse_args(given)
    architecture = options.architecture or build.device_architecture()
    if not architecture or (options.part != "build" and not build.device_architecture()):
        print("make gpu: PyTorch finds no CUDA device here", file=sys.stderr)
        return 1
    output.mkdir(parents=True, exist_ok=True)
    stages = Stages(output)
    report = run(options.part, options.seconds, architecture, stages)
    about = machine()
    written = output / ("report.json" if options.part == "all" else f"{options.part}.json")
    whole = {"machine": about, "stages": stages.as_json(), **report}
    written.write_text(json.dumps(whole, indent=1, default=str))
    title = f"make gpu {options.part}: {', '.join(about.values())}; {written}"
    print(table({title: [], **sections(report, stages)}))
    return int(any(stage.failed for stage in stages.done))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
