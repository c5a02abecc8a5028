"""Whether an adapter's folder is whole, and fits a model's folder."""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from ._library import library
from .files import FileError
from .folder_changes import SHOWN, placed_changes
from .model_folder import ModelFolder, read_model_folder
from .tree import endings_of

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
UNFINISHED = ".rankwise-save"  # what a save's files begin with until it is done
HEADS = {"classifier", "score"}  # PEFT adds both to every classifier's modules


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Args:
        name: what.
        ok: whether that is as it must be.
        found: what is wrong, or what there is.
    """

    name: str
    ok: bool
    found: str


def verify_folder(folder: str | os.PathLike, model: str | os.PathLike | None = None) -> list[Check]:
    """Looks at all that can be wrong with an adapter's folder; at no weights of a model.

    Where the files cannot be read, or are not those that the configuration describes, the checks
    end there.

    Args:
        folder: of LoRA or AdaLoRA.
        model: also whether every tensor has its place in this folder of transformers' model.

    Raises:
        FileError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileError(f"{folder}: cannot open the folder: no such folder")
    finished = _finished(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            adapter = library.read_adapter(folder)
        except FileError as error:
            return [finished, Check("files", False, str(error))]
    updates = library.updates_of(adapter)
    counted = f"{len(adapter.tensors)} tensors, {len(updates)} adapted modules"
    checks = [finished, Check("files", True, counted)]
    if not finished.ok:
        return checks
    config = json.loads((folder / CONFIG).read_bytes())
    modules = [update.module for update in updates]
    checks += [
        _checksums(folder),
        _options([str(warning.message) for warning in caught]),
        _targets(config, modules),
        _trained_whole(adapter),
        _values(adapter),
        _dtypes(adapter),
    ]
    return checks if model is None else [*checks, _model(model, adapter, config)]


def _finished(folder: Path) -> Check:
    left = sorted(path.name for path in folder.iterdir() if path.name.startswith(UNFINISHED))
    found = f"{', '.join(left)}; the next save into the folder settles it" if left else "yes"
    return Check("save finished", not left, found)


def _checksums(folder: Path) -> Check:
    """Reading compares them."""
    from safetensors import safe_open

    with safe_open(folder / TENSORS, framework="pt") as file:
        stored = file.metadata() or {}
    there = any(key.startswith("rankwise.") and key.endswith("_checksum") for key in stored)
    return Check("checksums", True, "right" if there else "none, as another program wrote it")


def _options(messages: list[str]) -> Check:
    unknown = [message for message in messages if "options that are not known" in message]
    return Check("options", not unknown, unknown[0] if unknown else "all known")


def _targets(config: dict, modules: list[str]) -> Check:
    """Whether targets have factors, and factors a target."""
    targets = config.get("target_modules")
    if not isinstance(targets, list):
        return Check("targets", True, f"a pattern, {targets!r}")
    excluded = config.get("exclude_modules") or []
    found = {ending for module in modules for ending in endings_of(module)}
    wrong = [
        f"{target}: has no factors"
        for target in sorted(set(targets) - found)
        if isinstance(excluded, list) and not set(endings_of(target)) & set(excluded)
    ]
    wrong += [f"{m}: is no target" for m in modules if not set(endings_of(m)) & set(targets)]
    return _check("targets", wrong, f"all {len(targets)} have factors")


def _trained_whole(adapter) -> Check:
    wanted = set(adapter.config.modules_to_save)
    keys = map(library.parse_adapter_key, adapter.tensors)
    saved = [key.module for key in keys if key.part == library.AdapterKey.Part.saved]
    # Of a module within the one that is named, too, and PEFT compares names without their dots.
    missing = [name for name in wanted - HEADS if not any(name in module for module in saved)]
    wrong = [f"{name}: has no tensors" for name in sorted(missing)]
    return _check("trained whole", wrong, f"{len(saved)} tensors")


def _values(adapter) -> Check:
    wrong = [key for key, tensor in adapter.tensors.items() if not tensor.isfinite().all()]
    return _check("values", [f"{key}: infinite or NaN" for key in wrong], "all finite")


def _dtypes(adapter) -> Check:
    counts = Counter(str(tensor.dtype) for tensor in adapter.tensors.values())
    parts = [f"{n} {dtype.removeprefix('torch.')}" for dtype, n in counts.most_common()]
    return Check("dtypes", True, ", ".join(parts))


def _model(path: str | os.PathLike, adapter, config: dict) -> Check:
    try:
        folder = read_model_folder(path)
        places = placed_changes(folder, adapter)
    except FileError as error:
        return Check("model", False, str(error))
    wrong = [f"{name}: is a target without factors" for name in _left(folder, config, places)]
    return _check("model", wrong, f"has a place for all {len(places)}")


def _left(folder: ModelFolder, config: dict, places: Collection[str]) -> Iterator[str]:
    """Matrices that a target names and that have no factors."""
    if any(config.get(option) for option in ("exclude_modules", "layers_to_transform")):
        return
    targets = config.get("target_modules")
    for name, stored in folder.tensors.items():
        module = name.removesuffix(".weight")
        named = isinstance(targets, list) and set(endings_of(module)) & set(targets)
        if named and module != name and len(stored.shape) == 2 and name not in places:
            yield module


def _check(name: str, wrong: list[str], right: str) -> Check:
    more = [f"and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
    return Check(name, not wrong, "; ".join(wrong[:SHOWN] + more) or right)
