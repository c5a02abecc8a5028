# Instructions that a small call costs beside its matrix products: the stable measure of host time.
"""Counts those of forward and backward of one layer, one thread, and where rankwise's go.

Needs Valgrind with its headers and g++ (tools/system_packages.sh bench); a few minutes. Valgrind
has no AVX-512, so vector loops are AVX2's here; the inner kernels of MKL and oneDNN are left out,
whatever they are.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from argparse import Namespace
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.table import Table

from .host_calls import NAMES
from .measurement import Measurement, number
from .timing import console

WANTED = 0.5  # of PEFT's
MARKERS = """
#include <valgrind/callgrind.h>
extern "C" void start() { CALLGRIND_START_INSTRUMENTATION; }
extern "C" void stop() { CALLGRIND_STOP_INSTRUMENTATION; }
extern "C" void zero() { CALLGRIND_ZERO_STATS; }
extern "C" void dump() { CALLGRIND_DUMP_STATS; }
"""
KERNELS = (
    "mkl_blas_*gemm_kernel*",
    "dnnl::impl::cpu::x64::brgemm_kernel_execute*",
    "void rankwise::pack<*",
)
CALLGRIND = [
    "valgrind",
    "--tool=callgrind",
    "--instr-atstart=no",
    *(f"--toggle-collect={kernel}" for kernel in KERNELS),
    "--collect-atstart=yes",  # so that the kernels switch it off, not on
]
# Functions that say what is paid for; what lies between them is the dispatcher.
TELLING = re.compile(r"rankwise::.*|at::_ops::\w+::call|THPEngine_run_backward")
SHOWN = 40


def run(options: Namespace) -> dict[str, object]:
    tokens, width, rank, calls = options.tokens, options.width, options.rank, options.repeats
    with TemporaryDirectory() as folder:
        profiles = measure(Path(folder), tokens, width, rank, calls)
    counts = {name: total(text) / calls for name, text in profiles.items()}
    title = f"{tokens} tokens, {width} -> {width}, r {rank}: instructions of forward and backward"
    console.print(title)
    summary = Table("contender", "beside matrix products", "over PEFT")
    for name, count in counts.items():
        summary.add_row(name, f"{count:,.0f}", f"{count / counts['PEFT']:.2f}")
    console.print(summary)
    console.print(f"wanted: rankwise at most {WANTED:g} of PEFT")
    found = functions(profiles["rankwise"])
    telling = [f for f in found if TELLING.fullmatch(plain(f))]
    telling = sorted(telling, key=lambda f: -found[f][1])[:SHOWN]
    rows = [(plain(f), *(n / calls for n in found[f])) for f in telling]
    where = Table("function of rankwise", "calls", "instructions, with what it calls")
    for name, count, cost in rows:
        where.add_row(name, f"{count:g}", f"{cost:,.0f}")
    console.print(where)
    return {"instructions": counts, "rankwise": rows}


def measure(folder: Path, tokens: int, width: int, rank: int, calls: int) -> dict[str, str]:
    """{contender: callgrind's file}."""
    source, markers, profile = (folder / n for n in ("markers.cpp", "markers.so", "profile"))
    source.write_text(MARKERS)
    subprocess.run(["g++", "-shared", "-fPIC", "-o", markers, source], check=True)
    numbers = [str(n) for n in (tokens, width, rank, calls)]
    script = [sys.executable, "-m", f"{__package__}.host_calls", markers, *numbers]
    command = [*CALLGRIND, f"--callgrind-out-file={profile}", *script]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        console.print(run.stderr[-2000:])
        raise SystemExit(1)
    return {name: Path(f"{profile}.{i}").read_text() for i, name in enumerate(NAMES, 1)}


def total(profile: str) -> int:
    return int(re.search(r"^(?:summary|totals): (\d+)", profile, re.MULTILINE)[1])


def functions(profile: str) -> dict[str, tuple[int, int]]:
    """{function: (calls, instructions with what it calls)}, recursion counted once a level."""
    names: dict[str, str] = {}
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    lines = iter(profile.splitlines())
    for line in lines:
        if match := re.match(r"c?fn=\((\d+)\)(?: (.*))?", line):
            name = names.setdefault(match[1], match[2] or "")
        elif line.startswith("calls="):
            found[name][0] += int(line.removeprefix("calls=").split()[0])
            found[name][1] += int(next(lines).split()[1])
    return {name: tuple(counts) for name, counts in found.items()}


def plain(function: str) -> str:
    """Without arguments and result."""
    name = function.replace("(anonymous namespace)::", "")
    lambdas = re.search(r"_Function_handler<[^,]*, (rankwise::\w+).*::_M_invoke", name)
    if lambdas:
        return f"{lambdas[1]}, its blocks"
    return re.split(r"[(\[]| const", name)[0].removeprefix("void ")


MEASUREMENT = Measurement(
    run,
    repeats=20,
    quick={"repeats": 5},
    threads=None,
    arguments={
        "--tokens": number(16, "rows of the input"),
        "--width": number(384, "inputs and outputs"),
        "--rank": number(8, "of the adapter"),
    },
)
