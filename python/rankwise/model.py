"""Adapters for whole models: apply, add, activate, delete, disable, merge."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from .adapted import Adapted, MergeReport, check_adapter_name
from .config import LoRAConfig
from .nn import adapt
from .targets import find_targets, find_whole, lookup, module_paths


@dataclass
class ModelAdapters:
    """What a model's layers do not know: the configurations, and modules trained whole.

    Kept as a plain attribute of the model, so that it is copied and pickled with it.
    """

    configs: dict[str, LoRAConfig] = field(default_factory=dict)
    active: str | None = None
    # adapter -> {name: its own trained copy}; under None the base's originals.
    whole: dict[str | None, dict[str, nn.Module]] = field(default_factory=lambda: {None: {}})

    @staticmethod
    def of(model: nn.Module) -> ModelAdapters:
        state = vars(model).get("_rankwise")
        if state is None:
            raise ValueError("the model has no adapters: call apply_lora(model, config) first")
        return state


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
        ValueError: no such targets (near misses are listed), tied weights, or adapters there already.
    """
    if "_rankwise" in vars(model):
        raise ValueError("apply_lora: the model has adapters already; use add_adapter()")
    _add(model, ModelAdapters(), name, config)
    model.requires_grad_(False)
    activate_adapter(model, name)
    return model


def add_adapter(model: nn.Module, name: str, config: LoRAConfig) -> None:
    """Adds an adapter, not active, over the same base; its targets may differ from others'."""
    _add(model, ModelAdapters.of(model), name, config)


def _add(model: nn.Module, state: ModelAdapters, name: str, config: LoRAConfig) -> None:
    if name in state.configs:
        raise ValueError(f"add_adapter: there is an adapter {name!r} already")
    check_adapter_name("add_adapter", name)
    targets = find_targets(model, config)
    originals = {**find_whole(model, config.modules_to_save), **state.whole[None]}
    # Everything that can fail comes before the model is changed.
    layers = {p: m if isinstance(m, Adapted) else adapt(m) for p, m in targets.items()}
    adapters = {
        path: layer.new_adapter(
            config.options(lookup(config.rank_pattern, path), lookup(config.alpha_pattern, path))
        )
        for path, layer in layers.items()
    }
    copies = {
        path: copy.deepcopy(originals[path]) for path in find_whole(model, config.modules_to_save)
    }
    paths = module_paths(model)
    for path, layer in layers.items():
        layer.adapters[name] = adapters[path]
        for place in paths[targets[path]]:
            _replace(model, place, layer)
    state.whole[None] = originals
    state.whole[name] = copies
    state.configs[name] = config
    model._rankwise = state


def activate_adapter(model: nn.Module, name: str | None) -> None:
    """Switches to another adapter, or with None to the base alone; the base is not written.

    The active adapter's parameters require gradients, all others' do not.
    """
    state = ModelAdapters.of(model)
    if name is not None and name not in state.configs:
        raise KeyError(f"activate_adapter: adapters are {list(state.configs)}, got {name!r}")
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
    if name not in state.configs:
        raise KeyError(f"delete_adapter: adapters are {list(state.configs)}, got {name!r}")
    if state.active == name:
        activate_adapter(model, None)
    for layer in adapted_layers(model).values():
        if name in layer.adapter_names:
            layer.delete_adapter(name)
    del state.configs[name], state.whole[name]


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters, in the order they were added."""
    return list(ModelAdapters.of(model).configs)


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
        _use_whole(model, state, state.active)


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
                reports[name] = layer.merge()
    except BaseException as error:
        for name in reports:
            layers[name].unmerge()
        raise type(error)(f"{name}: {error}") from error
    return reports


def unmerge(model: nn.Module) -> None:
    """Gives every merged layer its base back, bit for bit."""
    ModelAdapters.of(model)
    for layer in adapted_layers(model).values():
        if layer.merged:
            layer.unmerge()


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent_path, _, attribute = path.rpartition(".")
    if not attribute:
        raise ValueError("the model itself is a layer; use LoRALinear.from_linear(layer) instead")
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
