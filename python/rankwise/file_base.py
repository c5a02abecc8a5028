"""Base weights in PEFT's folders: whose they are, and which of them the model has already."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from ._library import library
from .base_parameters import Place, tied_since
from .file_slots import Slot
from .model_adapters import ModelAdapters
from .sharding import check_unsharded, has_values, is_sharded
from .tree import Tree
from .whole import parts_of_whole

_Key, _Part = library.AdapterKey, library.AdapterKey.Part

# How PEFT names a parameter of the base: in a plain module, an adapted one, one trained whole.
_HOLDERS = ("", ".base_layer", ".original_module")


def saved_key(path: str, parameter: str) -> str:
    """PEFT's key of a parameter that is not a factor."""
    return str(_Key(path, _Part.saved, parameter))


def stored_copies(places: Collection[Place], tensors: Mapping[str, Tensor]) -> dict[Place, Tensor]:
    """What a folder has for these parameters of modules trained whole."""
    keys = {place: saved_key(*place) for place in places}
    return {place: tensors[key] for place, key in keys.items() if key in tensors}


def take_base(
    tree: Tree,
    tensors: dict[str, Tensor],
    slots: dict[str, Slot],
    base: Mapping[Place, nn.Parameter],
    own: Mapping[Place, nn.Parameter],
    whole: Mapping[str, nn.Module],
) -> dict[Place, nn.Parameter]:
    """Adds slots for the base's parameters that a folder holds.

    What the model has already, and what the adapter does not use, needs none and leaves `tensors`.

    Args:
        base: all of the model's.
        own, whole: the adapter's own parameters, and its copies of modules.

    Returns:
        The new ones, not filled yet: the adapter's own from now on, wherever the base has them.
    """
    parts = parts_of_whole(whole)
    brought = {id(base[place]): parameter for place, parameter in _brought(own, parts).items()}
    new: dict[Place, nn.Parameter] = {}
    for original, keys in _base_keys(tree, tensors, slots, base, parts):
        parameter = brought.get(id(original))
        if parameter is None:
            uses = [p for p in base if base[p] is original and p[0] not in parts]
            if not uses or all(has_values(original, tensors[key]) for key in keys):
                for key in keys:
                    del tensors[key]
                continue
            if is_sharded(original):
                check_unsharded("load_adapter", {keys[0]: original}, "load it before fully_shard")
            parameter = nn.Parameter(torch.empty_like(original), requires_grad=False)
            new.update(dict.fromkeys(uses, parameter))
        slots.update(dict.fromkeys(keys, Slot(parameter)))
    for key, slot in base_slots(own, whole).items():
        if not any(other.tensor is slot.tensor for other in slots.values()):
            slots[key] = slot  # missing in the file
    return new


def _base_keys(
    tree: Tree,
    tensors: dict[str, Tensor],
    slots: Mapping[str, Slot],
    base: Mapping[Place, nn.Parameter],
    parts: Collection[str],
) -> list[tuple[nn.Parameter, list[str]]]:
    """(base's parameter, the file's keys for it); drops from `tensors` what PEFT writes twice."""
    found: dict[int, tuple[nn.Parameter, list[str]]] = {}
    for key in sorted(tensors.keys() - slots.keys()):
        parsed = library.parse_adapter_key(key)
        if parsed is None or parsed.part != _Part.saved:
            continue
        top, again, _ = parsed.module.partition(".modules_to_save")
        if again and top in parts:
            del tensors[key]
            continue
        names = [tree.plain_name(parsed.module.replace(holder, "", 1)) for holder in _HOLDERS]
        places = [(name, parsed.parameter) for name in names]
        place = next((place for place in places if place in base), None)
        if place is not None:
            found.setdefault(id(base[place]), (base[place], []))[1].append(key)
    return list(found.values())


def _brought(
    own: Mapping[Place, nn.Parameter], parts: Collection[str]
) -> dict[Place, nn.Parameter]:
    """The adapter's own parameters that are no parts of modules trained whole."""
    return {place: p for place, p in own.items() if place[0] not in parts}


def base_slots(
    own: Mapping[Place, nn.Parameter],
    whole: Mapping[str, nn.Module],
    adapted: Collection[str] = (),
) -> dict[str, Slot]:
    """{PEFT's key: a parameter of the base that a folder brought}, each once though it is tied."""
    brought = _brought(own, parts_of_whole(whole))
    first = {id(p): (place, p) for place, p in reversed(brought.items())}
    return {
        saved_key(f"{path}.base_layer" if path in adapted else path, key): Slot(parameter)
        for (path, key), parameter in first.values()
    }


def brought_by(
    owner: str, model: nn.Module, name: str | None, adapted: Collection[str]
) -> dict[str, Slot]:
    """base_slots() of a model's adapter.

    Raises:
        ValueError: the model computes something else by now, because weights were tied since.
    """
    state = ModelAdapters.of(model)
    name = state.active if name is None else name
    tied = (
        tied_since(state.tree, state.whole, state.parameters, name) if name == state.in_use else []
    )
    if tied:
        raise ValueError(f"{owner}: {tied[0]}")
    return base_slots(state.parameters.get(name, {}), state.whole[name], adapted)
