# The third part of make gpu: what tests/bench measures on a GPU, most informative first.
from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec

from .build import environment
from .stages import ROOT, Budget, Environment, Stages

RESERVE = 0.3  # of a measurement's time: its start, and what began before its limit


@dataclass(frozen=True)
class Bench:
    """A measurement of tests/bench and its options; it needs these packages."""

    name: str
    weight: float
    options: tuple[str, ...]
    limited: bool  # it has a --limit
    needs: tuple[str, ...] = ()


WITH_PEFT = ("peft", "transformers")
BENCHES = [
    Bench("layers_cuda", 8, ("--quick",), limited=True),
    Bench("llama_step", 6, ("--device", "cuda", "--repeats", "5"), True, WITH_PEFT),
    Bench("kernels", 2, ("--device", "cuda"), limited=True),
    Bench("group", 1, ("--device", "cuda", "--quick"), limited=False),
    Bench(
        "allocator", 3, ("--device", "cuda", "--models", "Llama-2-7B", "--repeats", "3"),
        False, WITH_PEFT,
    ),
]  # fmt: skip


def measure(stages: Stages, seconds: float) -> dict:
    """{measurement: what it wrote}, of those that ended."""
    budget = Budget(seconds, {b.name: b.weight for b in BENCHES}, stages.clock)
    env, found = with_tests(environment()), {}
    for bench in BENCHES:
        missing = [name for name in bench.needs if find_spec(name) is None]
        if missing:
            stages.leave_out(bench.name, f"{' and '.join(missing)} not installed")
            continue
        limit = budget.of(bench.name)
        result = stages.output / f"{bench.name}.json"
        result.unlink(missing_ok=True)
        stages.run(bench.name, command(bench, limit, stages), limit, env)
        if result.exists():
            found[bench.name] = json.loads(result.read_text())["results"]
    return found


def command(bench: Bench, limit: float, stages: Stages) -> list[str]:
    within = max(1, int(limit * (1 - RESERVE)))
    limited = ["--limit", str(within)] if bench.limited else []
    own = [*bench.options, *limited, "--output", str(stages.output)]
    return [sys.executable, "-m", "bench", bench.name, *own]


def with_tests(env: Environment) -> Environment:
    folders = [env["PYTHONPATH"], str(ROOT / "tests")]
    return {**env, "PYTHONPATH": os.pathsep.join(folders)}


def rows(report: dict) -> dict[str, list[str]]:
    """A section for each measurement that ended."""
    return {title: of(report[name]) for name, (title, of) in SECTIONS.items() if name in report}


def layer_rows(found: dict) -> list[str]:
    """Of each contender the time over the frozen layer's, eager and from a graph."""
    result = []
    for row in found["cases"]:
        case, both, graph = row["case"], row["both"], row["graph"]
        ratios = [
            f"{name} {_ratio(both, name)}/{_ratio(graph, name)}"
            for name in both
            if name != "frozen"
        ]
        microseconds = 1e3 * both["frozen"]["median"]
        result.append(f"{_case(case)}: frozen {microseconds:.0f} us; {'; '.join(ratios)}")
    host = ", ".join(f"{name} {value:.0f}" for name, value in found["host"].items())
    return [*result, f"host us: {host}", *_unfinished(found)]


def step_rows(found: dict) -> list[str]:
    size = found["size"]
    result = [f"{size['name']}, {size['batch']} x {size['length']} tokens, bf16 base"]
    for title, part in found["parts"].items():
        result.append(f"{title}:")
        for name, row in part["steps"].items():
            peak = part["peak bytes"][name] / 2**30
            result.append(
                f"  {name:34} {row['median']:8.1f} ms  {row['ratio']:.3f} of frozen "
                f"({row['ratio_low']:.3f} .. {row['ratio_high']:.3f})  peak {peak:.2f} GiB"
            )
        result += [f"  {name} left out: {why}" for name, why in part["left out"].items()]
    return result + _unfinished(found)


def kernel_rows(found: dict) -> list[str]:
    result = []
    for row in found["cases"]:
        total = sum(k["microseconds"] for k in row["kernels"])
        result.append(f"{row['contender']}, {_case(row['case'])}: {total:.0f} us")
        if row["contender"] != "frozen":
            result += [
                f"  {k['microseconds']:8.1f} us x{k['count']:.1f}  {k['short']}"
                for k in row["kernels"][:7]
            ]
    return result + _unfinished(found)


def group_rows(found: list[dict]) -> list[str]:
    return [f"{each['case']}: {_times(each['rows'])}" for each in found]


def allocator_rows(found: dict) -> list[str]:
    return [f"{title}: {_times(rows)}" for title, rows in found.items()]


SECTIONS = {
    "layers_cuda": ("Layers: eager/graph time over frozen, forward and backward", layer_rows),
    "llama_step": ("Llama step: forward, backward, optimizer, allocator", step_rows),
    "kernels": ("Kernels of a layer, by the profiler", kernel_rows),
    "group": ("Three layers of one input", group_rows),
    "allocator": ("AdaLoRA's allocator", allocator_rows),
}


def _case(case: dict) -> str:
    sizes = f"{case['tokens']}, {case['n_in']} -> {case['n_out']}, r {case['rank']}"
    return f"{sizes}, {case['dtype']}, p {case['dropout']:g}"


def _ratio(rows: dict, name: str) -> str:
    return f"{rows[name]['ratio']:.2f}" if name in rows else "-"


def _times(rows: dict) -> str:
    return ", ".join(f"{n} {r['median']:.3f} ms ({r['ratio']:.3f})" for n, r in rows.items())


def _unfinished(found: dict) -> list[str]:
    failed = [f"failed: {what}: {why}" for what, why in found["failed"].items()]
    return failed + [f"no time was left for {what}" for what in found["unfinished"]]
