"""Parameters of the base that give way to an adapter's own: stored embeddings, trained tied ends.

PEFT's folders may hold weights of the base, such as those of a resized embedding. The base is never
written: while such an adapter is active its own parameter is in the place, whoever is tied to it.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from .merging import Mergeable
from .sharding import ADD_BEFORE, check_gathered, check_unsharded, is_sharded
from .tree import Tree
from .whole import WholeModules, parts_of_whole

Place = tuple[str, str]  # a module's first name, and a parameter's name in it

# adapter -> {place: the parameter there while it is active}; under None the base's own.
OwnParameters = dict[str | None, dict[Place, nn.Parameter]]


def _held(module: nn.Module, key: str) -> nn.Parameter | None:
    """A parameter of the base, also of a merged layer."""
    merged = isinstance(module, Mergeable) and key == "weight" and module.merged
    return module._base_weight() if merged else module._parameters.get(key)


def _put(module: nn.Module, key: str, parameter: nn.Parameter) -> None:
    if isinstance(module, Mergeable) and key == "weight" and module.merged:
        module._unmerged = (parameter,)
    else:
        module._parameters[key] = parameter


def base_parameters(
    tree: Tree, whole: WholeModules, own: OwnParameters
) -> dict[Place, nn.Parameter]:
    """All parameters of the base in the model's order, whichever adapter is active."""
    modules = {names[0]: module for module, names in tree.names.items()}
    modules.update(parts_of_whole(whole[None]))
    found = {
        (path, key): _held(module, key)
        for path, module in modules.items()
        for key in module._parameters
        if not (isinstance(module, Mergeable) and key.startswith("lora_"))
    }
    found.update({p: x for p, x in own[None].items() if not is_sharded(found.get(p))})
    return {place: parameter for place, parameter in found.items() if parameter is not None}


def copies_of(
    modules: Mapping[str, nn.Module], base: Mapping[Place, nn.Parameter]
) -> dict[str, nn.Module]:
    """Copies with the base's parameters where the modules have others; what is tied stays tied.

    Raises:
        ValueError: a parameter is partitioned by DeepSpeed's ZeRO-3.
    """
    for top, module in modules.items():
        named = {f"{top}.{key}": p for key, p in module.named_parameters()}
        check_gathered("modules_to_save", named, ADD_BEFORE)
    copies, copied = copy.deepcopy(dict(modules)), {}
    parts = parts_of_whole(copies)
    for (path, key), parameter in base.items():
        if path in parts:
            parts[path]._parameters[key] = copy.deepcopy(parameter, copied)
    return copies


def tied_ends(
    base: Mapping[Place, nn.Parameter], copies: Mapping[str, nn.Module], adapted: Collection[str]
) -> Iterator[tuple[Place, nn.Parameter, nn.Parameter | None]]:
    """(place, base's parameter, copy's or None) of ties with an end adapted or trained whole."""
    parts = parts_of_whole(copies)
    ties: dict[int, list[Place]] = {}
    for place, parameter in base.items():
        ties.setdefault(id(parameter), []).append(place)
    for places in ties.values():
        if len(places) > 1 and any(path in adapted or path in parts for path, _ in places):
            for path, key in places:
                copied = parts[path]._parameters[key] if path in parts else None
                yield (path, key), base[path, key], copied


def untie_copies(
    own: dict[Place, nn.Parameter], copies: Mapping[str, nn.Module], stored: Mapping[Place, Tensor]
) -> None:
    """Copies of tied ends stay one parameter, unless a folder has different values for them."""
    parts = parts_of_whole(copies)
    first: dict[int, Place] = {}
    for place, parameter in own.items():
        path, key = place
        twin = first.setdefault(id(parameter), place)
        if not _same(stored.get(twin), stored.get(place)):
            own[place] = parts[path]._parameters[key] = nn.Parameter(parameter.detach().clone())


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def expected_parameters(
    whole: WholeModules, own: OwnParameters, name: str | None
) -> dict[Place, nn.Parameter]:
    """What belongs in the places that some adapter has a parameter for, while `name` is active."""
    chosen, parts = own.get(name, {}), parts_of_whole(whole.get(name, {}))
    base = {place: p for place, p in own[None].items() if place[0] not in parts}
    return base | chosen


def use_parameters(
    model: nn.Module, whole: WholeModules, own: OwnParameters, name: str | None
) -> None:
    """Puts the adapter's own parameters in place, and the base's elsewhere.

    What somebody else put there stays: another parameter, or one of another size.
    """
    if not own[None]:
        return
    tree = Tree(model)
    known = {id(parameter) for held in own.values() for parameter in held.values()}
    for (path, key), chosen in expected_parameters(whole, own, name).items():
        module = tree.modules.get(path)
        current = None if module is None else _held(module, key)
        if id(current) not in known or chosen.shape != current.shape:
            continue
        if chosen is not current and not is_sharded(current):  # FSDP has its own in our place
            stood = any(held.get((path, key)) is current for held in own.values())
            dtype = current.dtype if stood else chosen.dtype  # what was tied since tells no move
            chosen.data = chosen.data.to(current.device, dtype)  # as the model since
            _put(module, key, chosen)


def check_not_sharded(
    operation: str, tree: Tree, whole: WholeModules, own: OwnParameters, name: str | None
) -> None:
    """Refuses to take out of the model what a folder brought and FSDP has in its books.

    Raises:
        ValueError: naming the parameter.
    """
    parts = parts_of_whole(whole.get(name, {}))
    brought = [place for place in own.get(name, {}) if place[0] not in parts]
    held = {p: _held(tree.modules[p[0]], p[1]) for p in brought if p[0] in tree.modules}
    sharded = {
        _name(place): parameter for place, parameter in held.items() if is_sharded(parameter)
    }
    check_unsharded(operation, sharded, "use the model before fully_shard for that")


def tied_since(tree: Tree, whole: WholeModules, own: OwnParameters, name: str | None) -> list[str]:
    """Parameters that hold another's, from which the adapter keeps them apart, one text each."""
    places = expected_parameters(whole, own, name).items()
    expected = {place: p for place, p in places if place[0] in tree.modules}
    held = {(path, key): _held(tree.modules[path], key) for path, key in expected}
    again = f"activate_adapter(model, {name!r}) puts that right"
    resized = "the vocabulary was resized since: do that before apply_lora(), or train both whole"
    return [
        f"{_name(place)}: tied to {_name(other)} since the adapter was activated, which "
        "keeps them apart (by tie_weights(), for example); "
        + (again if held[place].shape == expected[place].shape else resized)
        for place in expected
        for other in expected
        if held[place] is held[other]
        and expected[place] is not expected[other]
        and held[place] is not expected[place]
    ]


def _name(place: Place) -> str:
    return ".".join(filter(None, place))
