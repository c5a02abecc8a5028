"""Loads librankwise, after a check that it fits the torch that was imported."""

import sys
from importlib import import_module, metadata

import torch

__version__ = metadata.version("rankwise")


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _built_for_torch() -> str:
    """The torch minor that the installed package requires, which is the one it was built for."""
    for requirement in metadata.requires("rankwise") or []:
        if requirement.startswith("torch=="):
            return requirement.removeprefix("torch==").removesuffix(".*")
    raise ImportError("rankwise's package metadata names no torch version; install it with pip")


def load(found: str, built: str):
    """The binary module; one sentence with the command that rebuilds it if torch does not fit."""
    if _minor(found) != _minor(built):
        raise ImportError(
            f"rankwise was built for torch {built}, but torch {found} is installed; "
            "rebuild it with: pip install --no-build-isolation --force-reinstall --no-deps ."
        )
    module = import_module("rankwise._C")
    # Python itself turns its lock on for a module that does not say that it needs none.
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        raise ImportError(
            "rankwise needs Python's global lock, which PYTHON_GIL=0 or -X gil=0 keeps off; start "
            "Python without it"
        )
    return module


library = load(torch.__version__, _built_for_torch())
