"""Adapters for whole models: apply, add, activate, delete, disable, merge."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from .adapted import Adapted, MergeReport, StoredAdapter, check_adapter_name
from .config import AdapterOptions, LoRAConfig
from .nn import adapt
from .targets import find_targets, find_whole, lookup, module_paths


@dataclass
class ModelAdapters:
    """What a model's layers do not know: the adapters' names, and modules trained whole.

    Kept as a plain attribute of the model, so that it is copied and pickled with it.

    Args:
        active: the adapter in use, or None for the base alone.
        whole: adapter -> {module name: its own trained copy}; under None the base's originals.
    """

    active: str | None = None
    whole: dict[str | None, dict[str, nn.Module]] = field(default_factory=lambda: {None: {}})

    @property
    def names(self) -> list[str]:
        return [name for name in self.whole if name is not None]

    @staticmethod
    def of(model: nn.Module) -> ModelAdapters:
        """The model's state; made from its layers if they were put there by hand."""
        if "_rankwise" not in vars(model):
            layers = list(adapted_layers(model).values())
            if not layers:
                raise ValueError("the model has no adapters: call apply_lora(model, config) first")
            names = dict.fromkeys(name for layer in layers for name in layer.adapter_names)
            active = next((x.adapter for x in layers if x.adapter is not None), None)
            model._rankwise = ModelAdapters(active, {None: {}, **{name: {} for name in names}})
        return model._rankwise


def adapted_layers(model: nn.Module) -> dict[str, Adapted]:
    """{name: layer} of the adapted layers, each once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Adapted)}


def apply_lora(model: nn.Module, config: LoRAConfig, name: str = "default") -> nn.Module:
    """Puts LoRA layers in the place of a model's linear and embedding layers, in place.

    Every other parameter is frozen but those of `config.modules_to_save`, which are copied and
    trained whole. Parameters are shared, never copied.

    Args:
        model: any nn.Module that contains (not is) the layers to adapt.
        config: what and where.
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


def add_adapter(model: nn.Module, name: str, config: LoRAConfig) -> None:
    """Adds an adapter, not active, over the same base; its targets may differ from others'."""
    state = ModelAdapters.of(model)
    install_adapter(model, state, name, prepare_adapter(model, state, name, *plan(model, config)))


def plan(model: nn.Module, config: LoRAConfig) -> tuple[dict[str, AdapterOptions], list[str]]:
    """({layer: options}, modules trained whole) that a configuration means for a model."""
    options = {
        path: config.options(lookup(config.rank_pattern, path), lookup(config.alpha_pattern, path))
        for path in find_targets(model, config)
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
    targets = {path: model.get_submodule(path) for path in options}
    layers = {p: m if isinstance(m, Adapted) else adapt(m) for p, m in targets.items()}
    originals = {**{path: model.get_submodule(path) for path in whole}, **state.whole[None]}
    return PreparedAdapter(
        layers,
        {path: layer.new_adapter(options[path]) for path, layer in layers.items()},
        originals,
        {path: copy.deepcopy(originals[path]) for path in whole},
    )


def install_adapter(
    model: nn.Module, state: ModelAdapters, name: str, prepared: PreparedAdapter
) -> None:
    """Puts a prepared adapter into the model, not active."""
    paths = module_paths(model)
    for path, layer in prepared.layers.items():
        layer.adapters[name] = prepared.adapters[path]
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
    _use_whole(model, state, name)
    state.active = name


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
    layers = adapted_layers(model).values()
    before = [layer.adapters_enabled for layer in layers]
    for layer in layers:
        layer.adapters_enabled = False
    _use_whole(model, state, None)
    try:
        yield model
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.adapters_enabled = enabled
        _use_whole(model, state, state.active if any(before) else None)


def merge(model: nn.Module) -> dict[str, MergeReport]:
    """Merges the active adapter into every layer's weight, all or none; {layer: report}.

    While merged, ``model.state_dict()`` is that of the plain model with merged weights.
    """
    ModelAdapters.of(model)
    reports: dict[str, MergeReport] = {}
    layers = {n: m for n, m in adapted_layers(model).items() if m.adapter is not None}
    if not layers:
        raise RuntimeError("merge: no adapter is active")
    try:
        for name, layer in layers.items():
            if not layer.merged:
                reports[name] = _merge_layer(name, layer)
    except BaseException:
        for name in reports:
            layers[name].unmerge()
        raise
    return reports


def _merge_layer(name: str, layer: Adapted) -> MergeReport:
    try:
        return layer.merge()
    except RuntimeError as error:
        raise RuntimeError(f"{name}: {error}") from error


def unmerge(model: nn.Module) -> None:
    """Gives every merged layer its base back, bit for bit."""
    ModelAdapters.of(model)
    for layer in adapted_layers(model).values():
        if layer.merged:
            layer.unmerge()


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent_path, _, attribute = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    parent._modules[attribute] = module
    if isinstance(parent, nn.TransformerEncoderLayer):
        # Its inference fast path reads the linears' weights and would leave the adapters out.
        parent.activation_relu_or_gelu = 0


def _use_whole(model: nn.Module, state: ModelAdapters, name: str | None) -> None:
    """Puts the adapter's own copies of whole modules in place, and the originals elsewhere."""
    paths = module_paths(model)
    by_name = {place: module for module, places in paths.items() for place in places}
    for path, original in state.whole[None].items():
        chosen = state.whole.get(name, {}).get(path, original)
        current = by_name[path]
        if chosen is current:
            continue
        reference = next(current.parameters(), None)
        if reference is not None:  # model.to() did not reach modules that are not in place
            chosen.to(device=reference.device, dtype=reference.dtype)
        chosen.train(current.training)
        chosen.requires_grad_(chosen is not original)
        for place in paths[current]:
            _replace(model, place, chosen)
