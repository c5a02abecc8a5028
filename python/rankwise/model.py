"""Adapters for whole models: apply, add, activate, delete, disable, merge."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from .adapted import Adapted, MergeReport, StoredAdapter, check_adapter_name
from .config import AdapterOptions, TargetConfig
from .nn import adapt
from .targets import find_targets, find_whole, lookup, module_paths


@dataclass
class ModelAdapters:
    """What a model's layers do not know: the adapters' names, and modules trained whole.

    Kept as a plain attribute of the model, so that it is copied and pickled with it.

    Args:
        active: the adapter in use, or None for the base alone.
        disabled: how many disable_adapters() blocks we are in.
        whole: adapter -> {module name: its own trained copy}; under None the base's originals.
    """

    active: str | None = None
    disabled: int = 0
    whole: dict[str | None, dict[str, nn.Module]] = field(default_factory=lambda: {None: {}})

    @property
    def names(self) -> list[str]:
        return [name for name in self.whole if name is not None]

    @staticmethod
    def of(model: nn.Module) -> ModelAdapters:
        """The model's state; made from its layers as far as they were put there by hand."""
        layers = list(adapted_layers(model).values())
        if not layers:
            raise ValueError("the model has no adapters: call apply_lora(model, config) first")
        if "_rankwise" not in vars(model):
            active = next((x.adapter for x in layers if x.adapter is not None), None)
            model._rankwise = ModelAdapters(active)
        for layer in layers:
            for name in layer.adapter_names:
                model._rankwise.whole.setdefault(name, {})
        return model._rankwise

    def use_whole(self, model: nn.Module) -> None:
        """Puts the active adapter's own whole modules in place, or the base's while disabled."""
        _use_whole(model, self, None if self.disabled else self.active)


def adapted_layers(model: nn.Module) -> dict[str, Adapted]:
    """{name: layer} of the adapted layers, each once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Adapted)}


def apply_lora(model: nn.Module, config: TargetConfig, name: str = "default") -> nn.Module:
    """Puts adapted layers in the place of a model's linear and embedding layers, in place.

    Every other parameter is frozen but those of `config.modules_to_save`, which are copied and
    trained whole. Parameters are shared, never copied.

    Args:
        model: any nn.Module that contains (not is) the layers to adapt.
        config: what and where: a LoRAConfig or an AdaLoRAConfig.
        name: of the adapter; more are added with add_adapter().

    Returns:
        The same model.

    Raises:
        ValueError: no such targets (near misses are listed), tied weights, or adapters already.
    """
    if adapted_layers(model):
        raise ValueError("apply_lora: the model has adapters already; use add_adapter()")
    state = ModelAdapters()
    install_adapter(model, state, name, prepare_adapter(model, state, name, *plan(model, config)))
    model.requires_grad_(False)
    activate_adapter(model, name)
    return model


def add_adapter(model: nn.Module, name: str, config: TargetConfig) -> None:
    """Adds an adapter, not active, over the same base; its targets may differ from others'."""
    state = ModelAdapters.of(model)
    install_adapter(model, state, name, prepare_adapter(model, state, name, *plan(model, config)))


def plan(model: nn.Module, config: TargetConfig) -> tuple[dict[str, AdapterOptions], list[str]]:
    """({layer: options}, modules trained whole) that a configuration means for a model."""
    paths = module_paths(model)
    options = {
        path: config.options(
            lookup(config.rank_pattern, paths[module]), lookup(config.alpha_pattern, paths[module])
        )
        for path, module in find_targets(model, config).items()
    }
    return options, list(find_whole(model, config.modules_to_save))


@dataclass
class PreparedAdapter:
    """An adapter made for a model but not in it yet: nothing of the model has changed.

    Args:
        layers: layer name -> the adapted layer (new, or in the model already).
        adapters: layer name -> its adapter.
        originals, copies: module name -> the base's module and the adapter's own, trained whole.
    """

    layers: dict[str, Adapted]
    adapters: dict[str, StoredAdapter]
    originals: dict[str, nn.Module]
    copies: dict[str, nn.Module]


def prepare_adapter(
    model: nn.Module,
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
    _check_apart(model, state, options, whole)
    layers = {path: _adapted(path, model.get_submodule(path), options[path]) for path in options}
    originals = {**{path: model.get_submodule(path) for path in whole}, **state.whole[None]}
    return PreparedAdapter(
        layers,
        {path: _new_adapter(path, layer, options[path]) for path, layer in layers.items()},
        originals,
        {path: copy.deepcopy(originals[path]) for path in whole},
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


def _check_apart(
    model: nn.Module, state: ModelAdapters, options: dict[str, AdapterOptions], whole: list[str]
) -> None:
    """A module trained whole for one adapter cannot hold another's layers: refuses by name."""
    for path in options:
        for top in state.whole[None]:
            if f"{path}.".startswith(f"{top}."):
                raise ValueError(
                    f"target_modules: {path!r} is in {top!r}, which another adapter trains whole"
                )
    for top in whole:
        if any(isinstance(module, Adapted) for module in model.get_submodule(top).modules()):
            raise ValueError(f"modules_to_save: {top!r} holds the layers of another adapter")


def install_adapter(
    model: nn.Module, state: ModelAdapters, name: str, prepared: PreparedAdapter
) -> None:
    """Puts a prepared adapter into the model, not active."""
    paths = module_paths(model)
    for path, layer in prepared.layers.items():
        layer.adapters[name] = prepared.adapters[path]
        layer.adapters_enabled = not state.disabled
        for place in paths[model.get_submodule(path)]:
            _replace(model, place, layer)
    state.whole.update({None: prepared.originals, name: prepared.copies})
    model._rankwise = state


def activate_adapter(model: nn.Module, name: str | None) -> None:
    """Switches to another adapter, or with None to the base alone; the base is not written.

    The active adapter's parameters require gradients, all others' do not.
    """
    state = ModelAdapters.of(model)
    if name is not None and name not in state.whole:
        raise KeyError(f"activate_adapter: adapters are {state.names}, got {name!r}")
    layers = adapted_layers(model).values()
    if any(layer.merged for layer in layers):
        raise RuntimeError("activate_adapter: the model is merged; call unmerge(model) first")
    for layer in layers:
        layer.activate_adapter(name)
    state.active = name
    state.use_whole(model)


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


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters, in the order they were added."""
    return ModelAdapters.of(model).names


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model computes its base, merged or not; also modules trained whole."""
    state = ModelAdapters.of(model)
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


def merge(model: nn.Module) -> dict[str, MergeReport]:
    """Merges the active adapter into every layer's weight, all or none; {layer: report}.

    While merged, ``model.state_dict()`` is that of the plain model with merged weights. A model
    that is merged already is left alone, with a warning.
    """
    ModelAdapters.of(model)
    reports: dict[str, MergeReport] = {}
    layers = {n: m for n, m in adapted_layers(model).items() if m.adapter is not None}
    if not layers:
        raise RuntimeError("merge: no adapter is active")
    if all(layer.merged for layer in layers.values()):
        warnings.warn("merge: the model is merged already; nothing was done", stacklevel=2)
        return reports
    try:
        for name, layer in layers.items():
            if not layer.merged:
                reports[name] = _merge_layer(name, layer)
    except BaseException:
        for name in reports:
            layers[name].unmerge()
        raise
    for layer in adapted_layers(model).values():
        layer.in_merged_model = True
    return reports


def _merge_layer(name: str, layer: Adapted) -> MergeReport:
    try:
        return layer.merge()
    except RuntimeError as error:
        raise RuntimeError(f"{name}: {error}") from error


def unmerge(model: nn.Module) -> None:
    """Gives every merged layer its base back, bit for bit; with none merged, only warns."""
    ModelAdapters.of(model)
    layers = adapted_layers(model).values()
    if not any(layer.merged for layer in layers):
        warnings.warn("unmerge: the model is not merged; nothing was done", stacklevel=2)
    for layer in layers:
        layer.in_merged_model = False
        if layer.merged:
            layer.unmerge()


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent_path, _, attribute = path.rpartition(".")
    model.get_submodule(parent_path)._modules[attribute] = module
    for name, ancestor in model.named_modules():
        if isinstance(ancestor, nn.TransformerEncoder) and f"{path}.".startswith(name):
            ancestor.use_nested_tensor = False  # only its layers' fast path can take nested tensors


def _use_whole(model: nn.Module, state: ModelAdapters, name: str | None) -> None:
    """Puts the adapter's own copies of whole modules in place, and the originals elsewhere."""
    paths = module_paths(model)
    by_name = {place: module for module, places in paths.items() for place in places}
    for path, original in state.whole[None].items():
        chosen = state.whole.get(name, {}).get(path, original)
        current = by_name[path]
        if chosen is current:
            continue
        _follow(chosen, current)
        chosen.requires_grad_(chosen is not original)
        for place in paths[current]:
            _replace(model, place, chosen)


def _follow(module: nn.Module, current: nn.Module) -> None:
    """Gives a module that was not in place the devices, dtypes and modes of its twin that was."""
    for mine, twin in zip(module.parameters(), current.parameters(), strict=True):
        mine.data = mine.data.to(twin)
    for mine, twin in zip(module.modules(), current.modules(), strict=True):
        mine.training = twin.training
        for name, buffer in mine._buffers.items():
            if buffer is not None:
                mine._buffers[name] = buffer.to(twin._buffers[name])
