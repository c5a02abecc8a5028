"""The adapters of a model as they are found in its tree."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from .adapted import Adapted
from .base_parameters import OwnParameters, Place, use_parameters
from .installed import Installed, installed, replaced
from .places import WholePlace, whole_places
from .tree import Tree, enclosing
from .whole import WholeModules, parts_of_whole


class ModelAdapters:
    """The adapters of a model as they are found in its tree, whichever part they were put into.

    Attributes:
        tree: the model's modules, as they were when this was made.
        layers: {name: layer} of the adapted layers.
        places: those whose modules adapters train whole, with their names.
        installed: {name: what was put into it} of the model and its parts.
    """

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.layers: dict[str, Adapted] = tree.adapted
        self.places: dict[WholePlace, list[str]] = whole_places(tree)
        self.installed: dict[str, Installed] = installed(tree)
        for place, paths in self.places.items():
            if place.adopted:
                self._adopt_parameters(place, paths)

    @staticmethod
    def of(model: nn.Module) -> ModelAdapters:
        """Raises ValueError: the model never had any."""
        state = ModelAdapters(Tree(model))
        if not state.layers and not state.names:
            raise ValueError("the model has no adapters: call apply_lora(model, config) first")
        return state

    @property
    def names(self) -> list[str]:
        """In the order in which they were added; also of those whose layers were all replaced."""
        held = [name for x in (*self.layers.values(), *self.places) for name in x.adapter_names]
        noted = [name for own in self.installed.values() for name in own.places]
        ordered = dict.fromkeys([*noted, *held])
        return [name for name in ordered if name in held or replaced(self.tree, name)]

    @property
    def active(self) -> str | None:
        """The adapter in use, or None for the base alone.

        Raises:
            ValueError: parts of the model use different ones.
        """
        used = self._used
        if len(used) > 1:
            raise ValueError(
                f"parts of the model use different adapters, {sorted(used)}: give the name of "
                "one, or call activate_adapter(model, name)"
            )
        return next(iter(used), None)

    @property
    def _used(self) -> set[str]:
        """The adapters in use in parts; the one activated last where that is told."""
        in_places = [place.adapter for place in self.places if place.adapter in place.copies]
        used = {*(layer.adapter for layer in self.layers.values()), *in_places} - {None}
        asked = {own.active for own in self.installed.values()} & used
        return asked if len(asked) == 1 else used

    @property
    def disabled(self) -> bool:
        """Whether we are in a disable_adapters() block."""
        return any(own.disabled for own in self.installed.values())

    @property
    def in_use(self) -> str | None:
        """The active adapter, or None while disabled, or where parts use different ones."""
        used = self._used
        return next(iter(used)) if len(used) == 1 and not self.disabled else None

    @property
    def whole(self) -> WholeModules:
        """{adapter: {first name: its own module}} trained whole; under None the base's."""
        there = {paths[0]: place for place, paths in self.places.items() if not place.vacant}
        found: WholeModules = {None: {path: place.original for path, place in there.items()}}
        for name in self.names:
            found[name] = {
                path: place.copies[name].module
                for path, place in there.items()
                if name in place.copies
            }
        return found

    @property
    def parameters(self) -> OwnParameters:
        """{adapter: {place: its own parameter}} in place of the base's; under None the base's."""
        found: OwnParameters = {None: {}}
        for top, own in self.installed.items():
            for name, parameters in own.parameters.items():
                for (path, key), parameter in parameters.items():
                    full = ".".join(filter(None, (top, path)))
                    found.setdefault(name, {})[full, key] = parameter
        return found

    def add_parameters(
        self,
        name: str,
        base: Mapping[Place, nn.Parameter],
        own: Mapping[Place, nn.Parameter],
    ) -> None:
        """Notes parameters of an adapter, and the base's in their places."""
        parameters = Installed.at(self.tree).parameters
        parameters[None].update(base)
        parameters.setdefault(name, {}).update(own)

    def _adopt_parameters(self, place: WholePlace, paths: list[str]) -> None:
        """After another module was put in the place: what was noted of the old one's parameters."""
        parts = parts_of_whole({paths[0]: place.module})
        for top, own in self.installed.items():
            noted = own.parameters.get(place.standing, {})
            for path, key in list(noted):
                full = ".".join(filter(None, (top, path)))
                if enclosing(full, {paths[0]}) is not None:
                    parameter = parts[full]._parameters.get(key) if full in parts else None
                    del noted[path, key]
                    if parameter is not None:
                        noted[path, key] = parameter
        place.adopted = False

    def whole_of(self, name: str | None) -> dict[str, nn.Module]:
        """{first name: its own module} of what an adapter trains whole and the model has.

        Raises:
            RuntimeError: the base has got another module, which the adapter's does not fit.
        """
        found = {}
        for place, paths in self.places.items():
            if name in place.copies and not place.vacant:
                place.check_fits(paths[0], name)
                found[paths[0]] = place.copies[name].module
        return found

    def activate(self, name: str | None) -> None:
        """Puts an adapter's own modules and parameters in place; layers are not switched."""
        for place in self.places:
            place.adapter = name
        for own in self.installed.values():
            own.active = name
        self.stand()

    def stand(self) -> None:
        """Puts the active adapter's own modules and parameters in place, or while disabled the
        base's.

        Raises:
            RuntimeError: a module does not fit the base, whose own is left in its place.
        """
        for place in self.places:
            place.stand(self.tree)
        whole = self.whole
        for top, own in self.installed.items():
            inside = {
                name: {
                    path.removeprefix(f"{top}.") if top else path: module
                    for path, module in modules.items()
                    if not top or path.startswith(f"{top}.")
                }
                for name, modules in whole.items()
            }
            active = None if own.disabled else own.active
            use_parameters(self.tree.modules[top], inside, own.parameters, active)
        for place, paths in self.places.items():
            if place.adapters_enabled:
                place.check_fits(paths[0], place.adapter)
