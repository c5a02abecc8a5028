"""What an installation has to work with: versions, devices, which code serves them, problems."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib import metadata

import torch

from . import ops
from ._library import __version__, _built_for_torch, library

DTYPES = ("float32", "bfloat16", "float16", "float64")
MEASURED = [(16, 768, 768), (128, 384, 384), (512, 768, 3072), (2048, 768, 768)]  # tokens, in, out
TESTED = {"peft": "0.21.2", "transformers": "5.23.0", "accelerate": "1.15.0"}


@dataclass(frozen=True)
class Device:
    """One device; `paths` is {dtype: the implementation of lora_linear}."""

    name: str
    description: str
    paths: dict[str, str]


@dataclass(frozen=True)
class Installation:
    """What examine() found.

    Args:
        versions: {what: version} of Python, rankwise and torch.
        threads, processors: PyTorch's threads, and the processors this process may use.
        cuda_architectures: what the CUDA kernels were compiled for, as CMake's CUDA_ARCHITECTURES;
            "" in a build without them.
        packages: {optional package: (version found or None, version tested)}.
        problems: one sentence each, with what to do.
    """

    versions: dict[str, str]
    threads: int
    processors: int
    cuda_architectures: str
    devices: list[Device]
    packages: dict[str, tuple[str | None, str]]
    problems: list[str]


def examine() -> Installation:
    """Looks at the installation; starts CUDA where there is a device."""
    versions = {
        "rankwise": f"{__version__}, built for torch {_built_for_torch()}",
        "torch": torch.__version__,
        "Python": f"{platform.python_version()}, {platform.system()} {platform.machine()}",
    }
    threads, processors = torch.get_num_threads(), len(os.sched_getaffinity(0))
    devices = [_device("cpu", f"vectors: {torch.backends.cpu.get_cpu_capability()}")]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        name = f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}"
        devices.append(_device(f"cuda:{index}", name))
    problems = [problem for device in devices if (problem := _not_served(device))]
    if threads > processors:
        problems.append(
            f"torch has {threads} threads for {processors} processors: set OMP_NUM_THREADS or call "
            f"torch.set_num_threads({processors})"
        )
    packages = {name: (_version(name), tested) for name, tested in TESTED.items()}
    architectures = library.cuda_architectures
    return Installation(versions, threads, processors, architectures, devices, packages, problems)


def measure() -> list:
    """Times lora_linear on the CPU's paths: ops.measured_paths() of some usual layers.

    Takes some seconds, and is empty on a processor that the micro-kernel does not serve.
    """
    before = library.cpu_path()
    ops.set_cpu_path("measured")
    try:
        for dtype in (torch.float32, torch.bfloat16):
            for tokens, n_in, n_out in MEASURED:
                _run_layer(tokens, n_in, n_out, dtype)
    finally:
        library.set_cpu_path(before)
    return ops.measured_paths()


def _run_layer(tokens: int, n_in: int, n_out: int, dtype: torch.dtype, rank: int = 8) -> None:
    x, A = (torch.randn(n, n_in, dtype=dtype, requires_grad=True) for n in (tokens, rank))
    W = torch.randn(n_out, n_in, dtype=dtype)
    B = torch.randn(n_out, rank, dtype=dtype, requires_grad=True)
    y = ops.lora_linear(x, W, None, A, B, scaling=1.0)
    torch.autograd.grad(y, (x, A, B), torch.ones_like(y))


def _device(name: str, description: str) -> Device:
    def path(dtype: str) -> str:
        return ops.path(torch.empty(1, device=name, dtype=getattr(torch, dtype)))

    return Device(name, description, {dtype: path(dtype) for dtype in DTYPES})


def _not_served(device: Device) -> str | None:
    """float32 stands for all: where it has no kernels, no dtype has."""
    if "composite" not in device.paths["float32"]:
        return None
    if not library.cuda:
        setting = "RANKWISE_WITH_CUDA=on (it needs nvcc)"
    else:
        setting = f"RANKWISE_CUDA_ARCHITECTURES of this device ({device.description})"
    return (
        f"{device.name} is served by PyTorch's operations, for this build has no kernels for it: "
        f"reinstall rankwise with {setting}"
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
