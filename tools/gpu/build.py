# The first part of make gpu: a build for this machine, or the carried one where it fits.
"""A build is carried as build/gpu/site; build.json in it says what it was made of and for."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from .stages import OUTPUT, ROOT, SITE, Environment, Stages

HEADERS = ROOT / "build" / "headers"  # make gpu-headers
STAMP = "build.json"
# What a build is made of; python/rankwise may have installed headers beside its modules.
SOURCES = ("csrc/**/*", "python/rankwise/**/*.py", "CMakeLists.txt", "setup.py", "pyproject.toml")
LOADED = """
import json, torch, rankwise
from rankwise._library import library
like = torch.empty(0, dtype=torch.bfloat16, device="cuda" if torch.cuda.is_available() else "cpu")
large = (8192, 4096, 4096, 16)
print(json.dumps({
    "version": rankwise.__version__, "cuda": library.cuda,
    "architectures": library.cuda_architectures, "path": rankwise.ops.path(like),
    "large layers": rankwise.ops.path(like, large if like.is_cuda else ()),
}))
"""


@dataclass(frozen=True)
class Wanted:
    """What a build must be of and for."""

    version: str
    torch: str
    python: str  # the suffix of its modules
    architecture: str  # CMake's number
    sources: str


def device_architecture() -> str:
    """CMake's number of the device's architecture; "" without a device."""
    import torch

    if not torch.cuda.is_available():
        return ""
    return "{}{}".format(*torch.cuda.get_device_capability())


def wanted(architecture: str) -> Wanted:
    (version,) = re.findall(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    torch = ".".join(metadata.version("torch").split("+")[0].split(".")[:2])
    python = sysconfig.get_config_var("EXT_SUFFIX")
    return Wanted(version, torch, python, architecture, fingerprint(ROOT))


def fingerprint(root: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for pattern in SOURCES for p in root.glob(pattern) if p.is_file()):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(root).as_posix()} {content}\n".encode())
    return digest.hexdigest()[:16]


def refusals(site: Path, want: Wanted) -> list[str]:
    """Why the build in `site` does not serve; nothing when it does."""
    try:
        found = json.loads((site / STAMP).read_text())
    except FileNotFoundError:
        return [f"there is no {STAMP} in {site.name}"]
    except ValueError:
        return [f"{STAMP} is no JSON"]
    reasons = [
        f"its {name} is {found.get(name)}, wanted {value}"
        for name, value in asdict(want).items()
        if found.get(name) != value
    ]
    if not list((site / "rankwise").glob(f"_C*{want.python}")):
        reasons.append(f"it has no rankwise/_C{want.python}")
    return reasons


def environment(architecture: str = "") -> dict[str, str]:
    """Tools of this Python and the CUDA toolkit on the path; the package in build/gpu/site."""
    env = {"RANKWISE_TERM_PRODUCT": "on", **os.environ}
    folders = [sysconfig.get_path("scripts"), env["PATH"], "/usr/local/cuda/bin"]
    env["PATH"] = os.pathsep.join(folders)
    env["PYTHONPATH"] = os.pathsep.join([str(SITE), env.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    if architecture:
        env["RANKWISE_CUDA_ARCHITECTURES"] = f"{architecture}-real"  # sm_90a is always beside
    env.setdefault("MAX_JOBS", str(os.cpu_count()))
    env["RANKWISE_WITH_CUDA"] = "on"
    if find_spec("nlohmann_json") is None and (HEADERS / "nlohmann" / "json.hpp").exists():
        env.setdefault("RANKWISE_JSON_INCLUDE_DIR", str(HEADERS))
    return env


def build(stages: Stages, seconds: float, architecture: str, site: Path = SITE) -> dict:
    """What is in build/gpu/site then, and why it was built; "usable" says whether it loads."""
    want, report = wanted(architecture), {"usable": False}
    reasons = refusals(site, want)
    report |= {"wanted": asdict(want), "refused": reasons}
    if reasons:
        print("the carried build is not taken:", "; ".join(reasons), flush=True)
        if not compile_package(stages, seconds, architecture, site, want):
            return report
    return report | loaded(stages, environment(architecture))


def compile_package(
    stages: Stages, seconds: float, architecture: str, site: Path, want: Wanted
) -> bool:
    shutil.rmtree(site, ignore_errors=True)  # pip leaves files of an older package there
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-index"]
    options = ["--no-build-isolation", "--no-deps", "--target", str(site), "-v", "."]
    if not stages.run("build", pip + options, seconds, environment(architecture)):
        return False
    (site / STAMP).write_text(json.dumps(asdict(want), indent=1))
    return True


def loaded(stages: Stages, env: Environment) -> dict:
    """What the package says of itself in a process of its own."""
    command = [sys.executable, "-c", LOADED]
    done = subprocess.run(command, env=env, cwd=OUTPUT, capture_output=True, text=True)
    if done.returncode:
        stages.fail("load", done.stderr.strip().splitlines()[-1])
        return {"usable": False}
    found = json.loads(done.stdout)
    if not found["cuda"]:
        stages.fail("load", "the package was built without its CUDA side")
    return {"usable": bool(found["cuda"]), "loaded": found}


def rows(report: dict) -> list[str]:
    refused = report["refused"]
    taken = f"not the carried build: {'; '.join(refused)}" if refused else "the carried build"
    return [taken] + [f"{name}: {value}" for name, value in report.get("loaded", {}).items()]
