"""A new folder that appears whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .files import FileError


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a folder to fill; at the end it is on the disk and gets the name `path`.

    It lies beside `path`, so that an error, or a kill at any moment, leaves no `path`; the next
    writer clears what a kill left. One writer at a time.

    Raises:
        FileError: `path` exists and is not an empty folder, or is being written.
    """
    path = Path(os.path.abspath(path))
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileError(f"{path}: must be a new folder or an empty one")
    staged = path.with_name(f".{path.name}.partial")
    staged.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(staged, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileError(f"{path}: another process is writing it") from None
        _clear(staged)
        try:
            yield staged
            _sync(staged)
            os.rename(staged, path)
            _sync_entries(path.parent)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
    finally:
        os.close(descriptor)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _sync(folder: Path) -> None:
    """Files first, then the entries of the folders that hold them."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync_entries(Path(root, name))
        _sync_entries(Path(root))


def _sync_entries(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
