"""Between a model's adapters and PEFT's adapter_config.json: what to write, what was meant."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ._library import library
from .adapted import Adapted, HeldAdapter, StoredAdapter
from .config import NARROW, AdaLoRAConfig, AdapterOptions
from .installed import check_complete
from .model_adapters import ModelAdapters
from .nn import is_adaptable
from .prepared import Plan
from .sharding import has_values
from .tree import Tree, enclosing, endings_of, plain_state
from .whole import find_whole

# A module's adapter in the model (HeldAdapter, or what holds its factors) or made for it
# (StoredAdapter): the same attributes.
Adapters = Mapping[str, HeldAdapter | StoredAdapter | Adapted]

_Part = library.AdapterKey.Part
LINEAR_PARTS = (_Part.lora_A, _Part.lora_B)
EMBEDDING_PARTS = (_Part.embedding_A, _Part.embedding_B)
TRIPLET_PARTS = (_Part.triplet_A, _Part.triplet_B, _Part.triplet_E)


def adapter_of(
    owner: str, model: nn.Module, name: str | None
) -> tuple[dict[str, Adapted], dict[str, HeldAdapter], dict[str, nn.Module]]:
    """An adapter's layers, what they hold of it, and its modules trained whole; by module name."""
    state = ModelAdapters.of(model)
    check_complete(owner, state.tree, name)
    name = state.active if name is None else name
    if name not in state.names:
        raise ValueError(f"{owner}: adapters are {state.names}, got {name!r}")
    layers = {p: m for p, m in state.layers.items() if name in m.adapter_names}
    adapters = {path: layer.held_adapter(name) for path, layer in layers.items()}
    return layers, adapters, state.whole_of(name)


def shared_config(model: nn.Module, layers: Mapping[str, Adapted], adapters: Adapters):
    """What does not depend on the method: where the adapters are, and over which model."""
    config = library.AdapterConfig()
    config.dropout = _most_common(a.options.dropout for a in adapters.values())
    config.fan_in_fan_out = any(
        layers[p].transposed and not isinstance(layers[p], nn.Embedding) for p in adapters
    )
    tree = Tree(model)
    config.target_modules = library.target_names(list(adapters), list(tree.modules))
    config.base_model_name_or_path = getattr(tree.model, "name_or_path", "") or ""
    config.task_type = _most_common(a.options.task_type for a in adapters.values())
    return config


def add_method(config, adapters: Mapping[str, HeldAdapter]) -> None:
    """Adds the fields of the adapters' method, LoRA or AdaLoRA, to a shared_config.

    Raises:
        ValueError: the method's format cannot hold these adapters.
    """
    methods = ("AdaLoRA" if a.options.triplets else "LoRA" for a in adapters.values())
    if _one("a PEFT folder", "method", methods) == "AdaLoRA":
        _add_adalora(config, adapters)
    else:
        _add_lora(config, adapters)


def _add_lora(config, adapters: Mapping[str, HeldAdapter]) -> None:
    owner = "PEFT's LoRA folder"
    config.rslora = _one(owner, "value of rslora", (a.options.rslora for a in adapters.values()))
    ranks = {path: adapter.update_rank for path, adapter in adapters.items()}
    alphas = {path: _alpha(adapter) for path, adapter in adapters.items()}
    config.rank, config.alpha = _most_common(ranks.values()), _most_common(alphas.values())
    config.rank_pattern, config.alpha_pattern = _patterns(ranks), _patterns(alphas)


def _patterns(values: Mapping[str, float]) -> list[tuple[str, float]]:
    """Nothing when all values are alike, else all of them, the longest paths first.

    A pattern also matches the paths that end in it, and the first match counts.
    """
    if len(set(values.values())) == 1:
        return []
    return sorted(values.items(), key=lambda item: -len(item[0]))


def _add_adalora(config, adapters: Adapters) -> None:
    owner = "PEFT's AdaLoRA folder"
    options = [adapter.options for adapter in adapters.values()]
    config.peft_type = "ADALORA"
    config.rank = _one(owner, "initial rank", (o.rank for o in options))
    config.alpha = _one(owner, "alpha", (o.alpha for o in options))
    if _one(owner, "value of rslora", (o.rslora for o in options)):
        raise ValueError("save_adapter: PEFT's AdaLoRA has no rslora; use export_lora")
    grown = [path for path, adapter in adapters.items() if adapter.rank > config.rank]
    if grown:
        raise ValueError(
            f"save_adapter: PEFT's AdaLoRA ranks are at most the initial {config.rank}, got "
            f"{adapters[grown[0]].rank} in {grown[0]}; use export_lora"
        )
    if any(adapter.rank < config.rank for adapter in adapters.values()):
        # Which of the initial directions were kept is no longer known, nor does PEFT need it: the
        # file holds the kept ones alone, and their number is what counts. PEFT's allocator looks
        # for every module in the pattern.
        config.kept_directions = {
            path: [i < adapter.rank for i in range(config.rank)]
            for path, adapter in adapters.items()
        }
    config.allocation = _shared_allocation(adapters)


def _shared_allocation(adapters: Adapters):
    """The schedule that all adapters have, or None."""
    known = {adapter.options.allocation for adapter in adapters.values()}
    return known.pop() if len(known) == 1 else None


def adalora_config(model: nn.Module, name: str | None = None) -> AdaLoRAConfig:
    """The configuration of an AdaLoRA adapter in a model, as far as it is known there.

    For a ``RankAllocator(model, adalora_config(model))`` that goes on where a saved folder stopped,
    or to make the same adapter in another model. The schedule is that of the model's RankAllocator,
    else of apply_lora() or add_adapter(), else of the folder that was loaded.

    Args:
        model: with adapters.
        name: of the adapter; None for the active one.

    Raises:
        ValueError: there is no such adapter, it is not AdaLoRA's, its schedule is not known, or a
            folder's is wrong: option, wanted, got.
    """
    layers, adapters, whole = adapter_of("adalora_config", model, name)
    lora = [path for path, adapter in adapters.items() if not adapter.options.triplets]
    if lora:
        raise ValueError(f"adalora_config: {lora[0]} must have an AdaLoRA adapter, got LoRA")
    settings = _shared_allocation(adapters)
    if settings is None:
        raise ValueError(
            "adalora_config: the adapter's layers have no schedule in common: neither a "
            "configuration nor a folder gave one; make the RankAllocator with an AdaLoRAConfig"
        )
    options = {path: adapter.options for path, adapter in adapters.items()}
    shared = shared_config(model, layers, adapters)
    return AdaLoRAConfig.from_settings(
        settings,
        initial_rank=max(o.rank for o in options.values()),
        alpha=_most_common(o.alpha for o in options.values()),
        dropout=shared.dropout,
        adapter_dtype=_most_common(o.adapter_dtype for o in options.values()),
        target_modules=shared.target_modules,
        rank_pattern=dict(_patterns({path: o.rank for path, o in options.items()})),
        alpha_pattern=dict(_patterns({path: o.alpha for path, o in options.items()})),
        modules_to_save=list(whole) or (),
    )


def _one(owner: str, what: str, values: Iterable):
    distinct = sorted(set(values))
    if len(distinct) > 1:
        raise ValueError(
            f"save_adapter: {owner} has one {what} for all layers, got {distinct}; use export_lora"
        )
    return distinct[0]


def _alpha(adapter: HeldAdapter) -> float:
    """The alpha that gives the layer's scaling at its update's present rank."""
    options, rank = adapter.options, adapter.update_rank
    if rank == options.rank:
        return options.alpha
    return options.scaling * (math.sqrt(rank) if options.rslora else rank)


def _most_common(values: Iterable):
    return Counter(values).most_common(1)[0][0]


def plain_file(file, tree: Tree):
    """The file; with the model's names where it has those of a model in wrappers."""
    tensors = {_plain_key(key, tree): tensor for key, tensor in file.tensors.items()}
    if tensors.keys() == file.tensors.keys():
        return file
    config = file.config
    for field in ("rank_pattern", "alpha_pattern"):
        setattr(config, field, [(tree.plain_name(p), v) for p, v in getattr(config, field)])
    kept = config.kept_directions.items()
    config.kept_directions = {tree.plain_name(module): which for module, which in kept}
    config.modules_to_save = [tree.plain_name(name) for name in config.modules_to_save]
    return library.AdapterFile(config, tensors)


def _plain_key(key: str, tree: Tree) -> str:
    parsed = library.parse_adapter_key(key)
    if parsed is None:
        return key
    return str(library.AdapterKey(tree.plain_name(parsed.module), parsed.part, parsed.parameter))


def plan_of(tree: Tree, file) -> Plan:
    """The adapter that a file describes, over the modules that the model has.

    The rank in the options is the initial one, which AdaLoRA's scaling counts.
    """
    options = {}
    modules = {names[0]: module for module, names in tree.names.items()}
    settings = library.ModuleSettings(file.config)
    for key, tensor in file.tensors.items():
        parsed = library.parse_adapter_key(key)
        kinds = (LINEAR_PARTS, EMBEDDING_PARTS, TRIPLET_PARTS)
        if parsed is None or parsed.part not in [parts[0] for parts in kinds]:
            continue
        base = modules.get(parsed.module)
        if not (isinstance(base, Adapted) or (base is not None and is_adaptable(base))):
            continue  # the caller reports that the tensors have no place
        if isinstance(base, nn.Embedding) != (parsed.part in EMBEDDING_PARTS):
            continue
        triplets = parsed.part in TRIPLET_PARTS
        options[parsed.module] = AdapterOptions(
            rank=file.config.rank if triplets else tensor.shape[0],
            alpha=settings.alpha_of(parsed.module),
            dropout=file.config.dropout,
            rslora=file.config.rslora,
            adapter_dtype=_factor_dtype(tensor.dtype, base.weight.dtype),
            triplets=triplets,
            allocation=file.config.allocation if triplets else None,
            task_type=file.config.task_type,
        )
    whole = find_whole(tree, _saved_whole(tree, file))
    return options, {path: _whole_dtype(path, module, file) for path, module in whole.items()}


def _whole_dtype(path: str, module: nn.Module, file) -> torch.dtype | None:
    """float32 where a 16-bit module would round what is stored of it; None for the base's own."""
    stored, tensors = file.tensors, saved_tensors(path, module)
    wanted = {
        _factor_dtype(stored[key].dtype, tensors[key].dtype)
        for key in tensors.keys() & stored.keys()
    }
    return torch.float32 if torch.float32 in wanted else None


def saved_tensors(path: str, module: nn.Module) -> dict[str, Tensor]:
    """{PEFT's key: tensor} of a module trained whole."""
    tensors = {}
    for name, tensor in plain_state(module).items():
        owner, _, parameter = f"{path}.{name}".rpartition(".")
        tensors[str(library.AdapterKey(owner, _Part.saved, parameter))] = tensor
    return tensors


def _saved_whole(tree: Tree, file) -> list[str]:
    """The modules that a file's modules_to_save mean, as far as the model has them.

    PEFT adds the names of its usual heads to every classifier, and matches endings within a word
    too: "classifier" is also DistilBERT's pre_classifier, which a file has then.
    """
    wanted = [name for name in file.config.modules_to_save if name in tree.endings]
    for key, tensor in file.tensors.items():
        parsed = library.parse_adapter_key(key)
        if parsed is None or parsed.part != _Part.saved or parsed.module not in tree.modules:
            continue
        parameter = tree.modules[parsed.module]._parameters.get(parsed.parameter)
        if parameter is not None and not has_values(parameter, tensor):
            wanted += _within_words(parsed.module, file.config.modules_to_save)
    return wanted


def _within_words(path: str, endings: Iterable[str]) -> list[str]:
    """Of a module and those that hold it, the names that end so, but not at a dot."""
    parts = path.split(".")
    names = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return [n for n in names for e in endings if n.endswith(e) and e not in endings_of(n)]


def saved_beside(model: nn.Module, whole: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Modules trained whole, and those that PEFT looks for in the file because names end alike."""
    also = {
        name: module
        for name, module in Tree(model).modules.items()
        if any(_within_words(name, [path])[-1:] == [name] for path in whole)
        and enclosing(name, whole) is None
        and not any(isinstance(part, Adapted) for part in module.modules())
    }
    return {**also, **whole}


def _factor_dtype(stored: torch.dtype, base: torch.dtype) -> torch.dtype | None:
    """Over a 16-bit base float32 where that would round what is stored, else the base's dtype."""
    if base not in NARROW:
        return None
    return torch.float32 if torch.promote_types(stored, base) == torch.float32 else base
