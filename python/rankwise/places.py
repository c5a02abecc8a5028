"""Places whose modules adapters train whole: the base's module there, and each adapter's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from .masters import base_dtype, make_plain, mark, own_dtypes, widen
from .tree import AdaptedLayer, Tree

_PLACES = "_rankwise_whole"


@dataclass(eq=False)
class WholeCopy:
    """An adapter's own module for a place.

    Args:
        module: in the model while it is in use.
        base: the sizes that the base's module has where this one is used.
        dtype: asked for: float32 over a 16-bit base, else None.
    """

    module: nn.Module
    base: list[torch.Size]
    dtype: torch.dtype | None

    def widen(self) -> None:
        """Makes the module float32 where that was asked for, once all that are tied are made."""
        if self.dtype is not None:
            widen(self.module)


@dataclass(eq=False)
class WholePlace:
    """Whose module stands in a place of the model, and those that wait.

    What stands in the model is the truth, see look(). Kept as a plain attribute of the module above
    the place: every part of the model that has the place knows of it, and so do copies and pickles.

    Args:
        original: the base's module.
        copies: adapter -> its own.
        adapter: the active one; it need not have a copy here.
        standing: the adapter whose module is in the place, or None for the base's.
        vacant: the place is no longer in the model.
        adopted: another module was put there since.
        dtypes: of what stands there, from the time when it was put there.
    """

    original: nn.Module
    copies: dict[str, WholeCopy] = field(default_factory=dict)
    adapter: str | None = None
    adapters_enabled: bool = True
    standing: str | None = None
    vacant: bool = False
    adopted: bool = False
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dtypes = own_dtypes(self.original)

    @property
    def adapter_names(self) -> list[str]:
        return list(self.copies)

    @property
    def module(self) -> nn.Module:
        """What stands in the place, without what wraps it."""
        return self.original if self.standing is None else self.copies[self.standing].module

    def look(self, found: Mapping[str, nn.Module | None]) -> None:
        """Takes for its own what was put in the place, {name: module}, since the last time.

        Raises:
            ValueError: it cannot be said whose it is.
        """
        modules = set(found.values()) - {None}
        self.vacant = not modules
        if all(_wraps(module, self.module) for module in modules):
            return
        name = next(iter(found))
        if len(modules) > 1:
            raise ValueError(
                f"{', '.join(map(repr, found))}: one module trained whole was in all these places, "
                "and was replaced in some of them; put the same module in all"
            )
        self._adopt(name, modules.pop())

    def _adopt(self, name: str, module: nn.Module) -> None:
        if any(isinstance(inside, AdaptedLayer) for inside in module.modules()):
            raise ValueError(
                f"{name!r} is trained whole, and a module that holds adapted layers was put there; "
                "put a plain one there"
            )
        if module in (self.original, *(own.module for own in self.copies.values())):
            raise ValueError(
                f"{name!r}: the module put there is the base's or another adapter's; put a "
                "copy.deepcopy() of it there"
            )
        if self.standing is None:
            self.original = module
        else:
            mine = self.copies[self.standing]
            if mine.dtype is not None:
                mark(module, base_dtype(mine.module))
                widen(module)
            mine.module = module
        self.dtypes, self.adopted = own_dtypes(module), True

    def fits(self, name: str) -> bool:
        """Whether the base's module still has the sizes that the adapter's own stands for."""
        return self.copies[name].base == _sizes(self.original)

    def check_fits(self, path: str, name: str | None) -> None:
        """Raises RuntimeError when the base's module is not what the adapter's stands for."""
        if name in self.copies and not self.fits(name):
            raise RuntimeError(
                f"{path!r}: the base's module was replaced or resized while adapter {name!r}, "
                "which trains its own, was not in use; put one of the old sizes back, or "
                "delete_adapter() that adapter"
            )

    def new_copy(self, module: nn.Module, dtype: torch.dtype | None) -> WholeCopy:
        """A copy of the base's module for an adapter to train; not widen()ed yet."""
        masters = dtype == torch.float32
        if masters:
            mark(module)
        return WholeCopy(module, _sizes(self.original), dtype if masters else None)

    def add_copy(self, name: str, own: WholeCopy) -> None:
        self.copies[name] = own
        if own.dtype is not None:
            mark(self.original)

    def delete_adapter(self, tree: Tree, paths: list[str], name: str) -> None:
        """Forgets an adapter's module, not in use; a place without any is no longer one."""
        if self.standing == name:  # of a place that is no longer there
            self.standing = None
        self.copies.pop(name, None)
        if not self.copies:
            make_plain(self.original)
        for path in paths if not self.copies else ():
            note_place(tree, path, None)

    def stand(self, tree: Tree) -> None:
        """Puts the active adapter's module in the place, or the base's where it has none that fits.

        While adapters are disabled it is the base's.
        """
        in_use = self.adapters_enabled and self.adapter in self.copies
        name = self.adapter if in_use and self.fits(self.adapter) else None
        if self.vacant or name == self.standing:
            return
        leaving = self.module
        for waiting in (self.original, *(own.module for own in self.copies.values())):
            if waiting is not leaving:
                _follow(waiting, leaving, self.dtypes)
        self.standing = name
        _take_modes(self.module, leaving)
        self.module.requires_grad_(name is not None)
        self.dtypes = own_dtypes(self.module)
        tree.replace(leaving, self.module)


def _wraps(module: nn.Module, inner: nn.Module) -> bool:
    """Whether a module is the inner one, or computes it with nothing of its own, as if compiled."""
    if module is inner:
        return True
    tensors = [{id(t) for t in (*m.parameters(), *m.buffers())} for m in (module, inner)]
    return inner in module.modules() and tensors[0] == tensors[1]


def _sizes(module: nn.Module) -> list[torch.Size]:
    return [parameter.shape for parameter in module.parameters()]


def _take_modes(module: nn.Module, twin: nn.Module) -> None:
    modes = {name: own.training for name, own in Tree(twin).modules.items()}
    for name, own in Tree(module).modules.items():
        own.training = modes.get(name, twin.training)


def _follow(module: nn.Module, moved: nn.Module, before: dict[str, torch.dtype]) -> None:
    """Moves a module that waits as its twin in the model was: to its devices, and dtypes if new."""
    now = own_dtypes(moved)
    casts = {name: dtype for name, dtype in now.items() if before.get(name, dtype) != dtype}
    everywhere = set(casts.values()) if len(casts) == len(now) else set()
    every = everywhere.pop() if len(everywhere) == 1 else None
    twins = {
        (path, name): tensor
        for path, own in Tree(moved).modules.items()
        for name, tensor in (*own._parameters.items(), *own._buffers.items())
        if tensor is not None
    }
    first = next(iter(twins.values()), None)
    for path, own in Tree(module).modules.items():
        dtype = casts.get(path, None if path in now else every)
        for name, tensor in (*own._parameters.items(), *own._buffers.items()):
            twin = twins.get((path, name), first)
            if tensor is None or twin is None:
                continue
            device = tensor.device if twin.is_meta else twin.device
            floating = tensor.is_floating_point()
            tensor.data = tensor.data.to(device, dtype if floating and dtype else tensor.dtype)


def whole_places(tree: Tree) -> dict[WholePlace, list[str]]:
    """The places of a model whose modules adapters train whole, with their names, looked at anew.

    Raises:
        ValueError: something was put there of which it cannot be said whose it is.
    """
    names: dict[WholePlace, list[str]] = {}
    for parent, paths in tree.names.items():
        for key, place in vars(parent).get(_PLACES, {}).items():
            names.setdefault(place, []).extend(f"{p}.{key}".removeprefix(".") for p in paths)
    for place, paths in names.items():
        place.look({path: tree.modules.get(path) for path in paths})
    return names


def place_at(parent: nn.Module, key: str) -> WholePlace | None:
    """The place of a module trained whole that `parent` has under this key."""
    return vars(parent).get(_PLACES, {}).get(key)


def note_place(tree: Tree, path: str, place: WholePlace | None) -> None:
    """Puts a place, or with None no longer one, where whole_places() finds it."""
    parent, _, key = path.rpartition(".")
    attributes = vars(tree.modules[parent])
    others = {k: other for k, other in attributes.pop(_PLACES, {}).items() if k != key}
    places = others if place is None else {**others, key: place}
    if places:
        attributes[_PLACES] = places
