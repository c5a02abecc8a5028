"""Adapters for whole models: apply, add, activate, delete, disable."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from .adapted import Adapted, StoredAdapter, check_adapter_name
from .base_parameters import (
    OwnParameters,
    Place,
    base_parameters,
    check_not_sharded,
    copies_of,
    tied_ends,
    use_parameters,
)
from .config import AdapterOptions, TargetConfig
from .file_names import check_savable
from .left_out import warn_of_left_out
from .nn import adapt
from .patterns import pattern_values
from .sharding import reshard
from .stand_in import adopt_hooks
from .targets import ALL_LINEAR, find_targets, named
from .tree import Tree, adapted_layers, required_layers
from .whole import WholeModules, check_apart, check_owners, find_whole, use_whole
from .wrappers import unwrapped


@dataclass
class ModelAdapters:
    """What a model's layers do not know: the adapters' names, and modules trained whole.

    Kept as a plain attribute of the model, inside of wrappers, so that it is copied and pickled
    with it.

    Args:
        active: the adapter in use, or None for the base alone.
        disabled: how many disable_adapters() blocks we are in.
        whole: adapter -> {module name: its own trained copy}; under None the base's originals.
        parameters: adapter -> {place: its own parameter there}; under None the base's.
    """

    active: str | None = None
    disabled: int = 0
    whole: WholeModules = field(default_factory=lambda: {None: {}})
    parameters: OwnParameters = field(default_factory=lambda: {None: {}})

    @property
    def names(self) -> list[str]:
        return [name for name in self.whole if name is not None]

    @staticmethod
    def of(model: nn.Module) -> ModelAdapters:
        """The model's state; made from its layers as far as they were put there by hand."""
        layers, model = required_layers(model).values(), unwrapped(model)
        if "_rankwise" not in vars(model):
            active = next((x.adapter for x in layers if x.adapter is not None), None)
            model._rankwise = ModelAdapters(active)
        for layer in layers:
            for name in layer.adapter_names:
                model._rankwise.whole.setdefault(name, {})
        return model._rankwise

    def use_whole(self, model: nn.Module) -> None:
        """Puts the active adapter's own modules and parameters in place, or while disabled the
        base's."""
        use_whole(model, self.whole, self.in_use)
        use_parameters(model, self.whole, self.parameters, self.in_use)

    @property
    def in_use(self) -> str | None:
        """The active adapter, or None while disabled."""
        return None if self.disabled else self.active


def apply_lora(model: nn.Module, config: TargetConfig, name: str = "default") -> nn.Module:
    """Puts adapted layers in the place of a model's linear and embedding layers, in place.

    Every other parameter is frozen but those of `config.modules_to_save`, which are copied and
    trained whole. Parameters are shared, never copied. Of modules with a tied weight, such as an
    embedding and the output layer, all that are named train one copy; the others keep the base's.

    Args:
        model: any nn.Module that contains (not is) the layers to adapt; it may be compiled or in
            other wrappers, in whole or in part: names are always those of the plain model.
        config: what and where: a LoRAConfig or an AdaLoRAConfig.
        name: of the adapter; more are added with add_adapter().

    Returns:
        The same model.

    Raises:
        ValueError: no such targets (near misses are listed), tied weights, or adapters already.
    """
    tree = Tree(model)
    if tree.adapted:
        raise ValueError("apply_lora: the model has adapters already; use add_adapter()")
    reshard(model)
    state = ModelAdapters()
    install_adapter(tree, state, name, prepare_adapter(tree, state, name, *plan(tree, config)))
    model.requires_grad_(False)
    activate_adapter(model, name)
    return model


def add_adapter(model: nn.Module, name: str, config: TargetConfig) -> None:
    """Adds an adapter, not active, over the same base; its targets may differ from others'."""
    reshard(model)
    state, tree = ModelAdapters.of(model), Tree(model)
    install_adapter(tree, state, name, prepare_adapter(tree, state, name, *plan(tree, config)))


def plan(tree: Tree, config: TargetConfig) -> tuple[dict[str, AdapterOptions], list[str]]:
    """({layer: options}, modules trained whole) that a configuration means for a model."""
    whole = find_whole(tree, config.modules_to_save)
    check_owners(tree, whole)
    check_savable(whole)
    targets = find_targets(tree, config, whole)
    if config.target_modules == ALL_LINEAR:
        known = named(tree, config.exclude_modules or ()) | set(whole.values())
        warn_of_left_out(tree, targets.values(), known)
    names = {path: tree.names[module] for path, module in targets.items()}

    def values(field: str) -> dict:
        patterns = {tree.plain_name(p): value for p, value in getattr(config, field).items()}
        return pattern_values(field, patterns, names)

    ranks, alphas = values("rank_pattern"), values("alpha_pattern")
    return {p: config.options(ranks.get(p), alphas.get(p)) for p in names}, list(whole)


@dataclass
class PreparedAdapter:
    """An adapter made for a model but not in it yet: nothing of the model has changed.

    Args:
        layers: layer name -> the adapted layer (new, or in the model already).
        adapters: layer name -> its adapter.
        originals, copies: module name -> the base's module and the adapter's own, trained whole.
        base, own: place -> the base's parameter and the adapter's own, where that is not copies'
            business alone: a tied weight, or one that a folder brings.
    """

    layers: dict[str, Adapted]
    adapters: dict[str, StoredAdapter]
    originals: dict[str, nn.Module]
    copies: dict[str, nn.Module]
    base: dict[Place, nn.Parameter]
    own: dict[Place, nn.Parameter]


def prepare_adapter(
    tree: Tree,
    state: ModelAdapters,
    name: str,
    options: dict[str, AdapterOptions],
    whole: list[str],
) -> PreparedAdapter:
    """Makes an adapter by plan; whatever can fail fails here."""
    check_adapter_name("add_adapter", name)
    if name in state.whole:
        raise ValueError(f"add_adapter: there is an adapter {name!r} already")
    if "" in options:
        raise ValueError("the model itself is a layer; use LoRALinear.from_linear(layer) instead")
    check_apart(tree, state.whole, options, whole)
    layers = {path: _adapted(path, tree.modules[path], options[path]) for path in options}
    originals = {**{path: tree.modules[path] for path in whole}, **state.whole[None]}
    base = base_parameters(tree, state.whole, state.parameters)
    copies = copies_of({path: originals[path] for path in whole}, state.parameters[None])
    ends = list(tied_ends(base, copies, layers))
    return PreparedAdapter(
        layers,
        {path: _new_adapter(path, layer, options[path]) for path, layer in layers.items()},
        originals,
        copies,
        {place: parameter for place, parameter, _ in ends},
        {place: own for place, _, own in ends if own is not None},
    )


def _adapted(path: str, module: nn.Module, options: AdapterOptions) -> Adapted:
    if isinstance(module, Adapted):
        return module
    try:
        return adapt(module, options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from error


def _new_adapter(path: str, layer: Adapted, options: AdapterOptions) -> StoredAdapter:
    try:
        return layer.new_adapter(options)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def install_adapter(tree: Tree, state: ModelAdapters, name: str, prepared: PreparedAdapter) -> None:
    """Puts a prepared adapter into the model, not active."""
    for path, layer in prepared.layers.items():
        layer.adapters[name] = prepared.adapters[path]
        layer.adapters_enabled = not state.disabled
        tree.replace(tree.modules[path], layer)
        adopt_hooks(layer)
    state.whole.update({None: prepared.originals, name: prepared.copies})
    state.parameters[None].update(prepared.base)
    state.parameters[name] = prepared.own
    tree.model._rankwise = state


def activate_adapter(model: nn.Module, name: str | None) -> None:
    """Switches to another adapter, or with None to the base alone; the base is not written.

    The active adapter's parameters require gradients, all others' do not.
    """
    state = ModelAdapters.of(model)
    if name is not None and name not in state.whole:
        raise KeyError(f"activate_adapter: adapters are {state.names}, got {name!r}")
    reshard(model)
    layers = adapted_layers(model)
    if any(layer.merged for layer in layers.values()):
        raise RuntimeError("activate_adapter: the model is merged; call unmerge(model) first")
    check_switch(layers, name)
    for layer in layers.values():
        layer.activate_adapter(name)
    state.active = name
    state.use_whole(model)


def check_switch(layers: Mapping[str, Adapted], name: str | None) -> None:
    """Refuses, by name, factors that activate_adapter() cannot switch: sharded or computed."""
    for path, layer in layers.items():
        try:
            layer.check_switch(name)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def delete_adapter(model: nn.Module, name: str) -> None:
    """Forgets an adapter; if it was active, the model computes the base alone."""
    state = ModelAdapters.of(model)
    if name not in state.whole:
        raise KeyError(f"delete_adapter: adapters are {state.names}, got {name!r}")
    if state.active == name:
        activate_adapter(model, None)
    for layer in adapted_layers(model).values():
        if name in layer.adapter_names:
            layer.delete_adapter(name)
    del state.whole[name]
    state.parameters.pop(name, None)


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters, in the order they were added."""
    return ModelAdapters.of(model).names


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model computes its base, merged or not; also modules trained whole."""
    state = ModelAdapters.of(model)
    check_not_sharded("disable_adapters", Tree(model), state.whole, state.parameters, state.in_use)
    before = {layer: layer.adapters_enabled for layer in adapted_layers(model).values()}
    for layer in before:
        layer.adapters_enabled = False
    state.disabled += 1
    state.use_whole(model)
    try:
        yield model
    finally:
        state.disabled -= 1
        for layer in adapted_layers(model).values():  # also those added in the block
            layer.adapters_enabled = before.get(layer, not state.disabled)
        state.use_whole(model)
