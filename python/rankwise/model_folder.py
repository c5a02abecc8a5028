"""A model's folder as transformers' save_pretrained writes it: which tensors lie where."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from .files import FileError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
EXPORTS = (".gguf", ".onnx", ".h5", ".msgpack", ".ot")  # of the same weights, by other programs
WEIGHT_FILES = (*EXPORTS, ".safetensors", ".bin", ".pt", ".pth", ".index.json")
RESAVE = 'model.save_pretrained(FOLDER) of transformers writes "model.safetensors"'


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its bytes are [start, start + size) of the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class ModelFolder:
    """What a folder holds: by the headers of its files, without any weights.

    Args:
        shards: the files with the weights.
        tensors: by the name in the file.
        config: config.json.
    """

    path: Path
    shards: list[Path]
    tensors: dict[str, StoredTensor]
    config: dict

    @cached_property
    def ties(self) -> list[frozenset[str]] | None:
        """Names that are one parameter in transformers' model; None where it cannot be made."""
        if self.config.get("tie_word_embeddings") is False:
            return []
        try:
            model = self.empty_model()
        except FileError:
            return None
        names: dict[int, set[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), set()).add(name)
        return [frozenset(same) for same in names.values() if len(same) > 1]

    def empty_model(self) -> nn.Module:
        """transformers' model on the meta device, with the dtype of most of the weights.

        Raises:
            FileError: transformers cannot make it.
        """
        try:
            import transformers

            kind = getattr(transformers, self.config["architectures"][0])
            config = transformers.AutoConfig.from_pretrained(self.path, trust_remote_code=False)
            with torch.device("meta"):
                model = kind(config)
        except Exception as error:  # whatever a class that is not known may raise
            raise FileError(
                f"{self.path}: transformers cannot make this model: {type(error).__name__}: {error}"
            ) from error
        sizes: Counter[str] = Counter()
        for tensor in self.tensors.values():
            sizes[tensor.dtype] += tensor.size
        return model.to(DTYPES.get(sizes.most_common(1)[0][0], torch.float32))

    def others(self) -> Iterator[tuple[Path, bool]]:
        """(file's path in the folder, whether a copy of the model with other weights needs it).

        Not hidden ones; of files below folders all but other programs' forms of the weights.
        """
        for root, folders, files in os.walk(self.path, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            top = Path(root) == self.path
            for name in sorted(files):
                path = Path(root, name)
                if not name.startswith(".") and path not in self.shards:
                    indexed = top and name == INDEX and self.path / WEIGHTS not in self.shards
                    kept = not name.endswith(WEIGHT_FILES if top else EXPORTS)
                    yield path.relative_to(self.path), kept or indexed


def read_model_folder(path: str | os.PathLike) -> ModelFolder:
    """The headers of a folder with config.json and safetensors files, checked.

    Raises:
        FileError: the folder is no such, damaged, or of a quantised model.
    """
    path = Path(path)
    config = _json(path / "config.json")
    if (path / "adapter_config.json").exists():
        raise FileError(f"{path}: is an adapter's folder; the base model's folder is wanted")
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise FileError(
            f"{path}: the model is quantised ({method}); take the folder of the model before "
            "quantisation, and quantise the result"
        )
    shards = _shards(path)
    tensors: dict[str, StoredTensor] = {}
    for shard, wanted in shards.items():
        found = read_header(shard)
        if missing := wanted - found.keys():
            raise FileError(f"{shard}: {INDEX} wants {min(missing)!r} there; it has no such tensor")
        tensors |= {name: found[name] for name in wanted or found}
    return ModelFolder(path, list(shards), tensors, config)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """{name: where it lies} of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):  # checks the header: offsets, sizes, names
            pass
    except SafetensorError as error:
        raise FileError(f"{path}: damaged: {error}") from None
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    stored = {}
    for name, info in header.items():
        begin, end = info["data_offsets"]
        place = 8 + length + begin
        shape = tuple(info["shape"])
        stored[name] = StoredTensor(name, path, info["dtype"], shape, place, end - begin)
    return stored


def read_tensor(stored: StoredTensor) -> Tensor:
    """A copy of the values, of one of DTYPES."""
    return tensor_of(read_bytes(stored), stored)


def read_bytes(stored: StoredTensor) -> bytearray:
    memory = bytearray(stored.size)
    with open(stored.file, "rb") as file:
        file.seek(stored.start)
        if file.readinto(memory) != stored.size:
            raise FileError(f"{stored.file}: ends within tensor {stored.name!r}")
    return memory


def tensor_of(memory: bytearray, stored: StoredTensor) -> Tensor:
    """Bytes of a tensor as one that shares them."""
    dtype = DTYPES[stored.dtype]
    if not memory:
        return torch.empty(stored.shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype).view(stored.shape)


def _shards(path: Path) -> dict[Path, set[str]]:
    """The files with the weights, and what the index wants in each."""
    if (path / WEIGHTS).exists():
        return {path / WEIGHTS: set()}
    if not (path / INDEX).exists():
        other = sorted(p.name for p in path.iterdir() if p.name.endswith(WEIGHT_FILES))
        got = f"; {other[0]} is not read, and {RESAVE}" if other else ""
        raise FileError(f"{path}: has neither {WEIGHTS} nor {INDEX}{got}")
    shards: dict[Path, set[str]] = {}
    placed = _json(path / INDEX).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise FileError(f"{path / INDEX}: weight_map must name the file of each tensor")
    for name, file in placed.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise FileError(f"{path / INDEX}: must name files of the folder, got {file!r}")
        shards.setdefault(path / file, set()).add(name)
    return shards


def _json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, RecursionError, json.JSONDecodeError) as error:
        raise FileError(f"{path}: is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise FileError(f"{path}: must be an object, got {type(found).__name__}")
    return found
