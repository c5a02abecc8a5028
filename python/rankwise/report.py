"""What an adapted model is and whether it trains: summary() and health_check()."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.optim import Optimizer

from . import ops
from .adapted import Adapted
from .base_parameters import Place, expected_parameters, tied_since
from .config import NARROW
from .devices import FACTORS
from .installed import replaced
from .model_adapters import ModelAdapters
from .places import WholePlace
from .quantised import OverQuantised
from .sharding import check_matrices, check_not_flat, naming, reshard, whole
from .tree import Tree


@dataclass(frozen=True)
class LayerSummary:
    """One adapted layer; `adapter` None when the base alone is computed there."""

    name: str
    in_features: int
    out_features: int
    adapter: str | None
    rank: int
    capacity: int
    scaling: float
    dropout: float
    base_dtype: torch.dtype
    adapter_dtype: torch.dtype | None
    path: str
    merged: bool


@dataclass(frozen=True)
class Summary:
    """All adapted layers and the parameter counts; print it for a table.

    Args:
        layers: in the model's order.
        trainable, total: parameters that require a gradient, and all but those of adapters that
            are not active.
        replaced: {name: the type there now} where the active adapter was and no longer is.
    """

    layers: list[LayerSummary]
    trainable: int
    total: int
    replaced: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [("layer", "in", "out", "rank", "scaling", "dropout", "base", "adapter", "path")]
        for x in self.layers:
            rank = f"{x.rank}" if x.rank == x.capacity else f"{x.rank}/{x.capacity}"
            path = "merged" if x.merged else "base only" if x.adapter is None else x.path
            dtypes = [str(d or "-").removeprefix("torch.") for d in (x.base_dtype, x.adapter_dtype)]
            sizes = (str(x.in_features), str(x.out_features))
            rows.append((x.name, *sizes, rank, f"{x.scaling:g}", f"{x.dropout:g}", *dtypes, path))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(f"{c:<{w}}" for c, w in zip(r, widths, strict=True)) for r in rows]
        lines += [_replaced(name, kind) for name, kind in self.replaced.items()]
        share = 100.0 * self.trainable / max(self.total, 1)
        lines.append(
            f"trainable params: {self.trainable:,} || all params: {self.total:,} || "
            f"trainable%: {share:.4f}"
        )
        return "\n".join(line.rstrip() for line in lines)


def summary(model: nn.Module) -> Summary:
    """The adapted layers of a model: sizes, ranks, dtypes, and which implementation runs each."""
    reshard(model)
    state = ModelAdapters.of(model)
    layers = state.layers
    _check_whole("summary", model, layers)
    stored = {id(p) for m in layers.values() for p in m.adapters.parameters()}
    parameters = [p for p in model.parameters() if id(p) not in stored]
    return Summary(
        [_layer_summary(name, layer) for name, layer in layers.items()],
        trainable=sum(int(p.numel()) for p in parameters if p.requires_grad),
        total=sum(int(p.numel()) for p in parameters),
        replaced=replaced(state.tree),
    )


def _layer_summary(name: str, layer: Adapted) -> LayerSummary:
    inputs, outputs = layer._sizes
    with naming("summary", {f"{name}.lora_A": layer.lora_A}):
        capacity = int(layer.capacity)
    return LayerSummary(
        name=name,
        in_features=inputs,
        out_features=outputs,
        adapter=layer.adapter,
        rank=layer.rank,
        capacity=capacity,
        scaling=layer.scaling,
        dropout=layer.dropout,
        base_dtype=layer.weight.dtype,
        adapter_dtype=None if layer.lora_A is None else layer.lora_A.dtype,
        path=_path(layer) if layer.adapters_enabled else "disabled",
        merged=layer.merged,
    )


@dataclass(frozen=True)
class HealthReport:
    """What health_check() found.

    Args:
        problems: one sentence each; empty when the model trains as asked.
        checked: layers with an active adapter.
        paths: {implementation: number of layers it serves}.
    """

    problems: list[str] = field(default_factory=list)
    checked: int = 0
    paths: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        served = ", ".join(f"{count} by {path}" for path, count in self.paths.items())
        head = f"{self.checked} adapters checked ({served})"
        return "\n".join([f"{head}: {'ok' if self.ok else 'PROBLEMS'}", *self.problems])


def health_check(model: nn.Module, *optimizers: Optimizer) -> HealthReport:
    """Whether every active adapter trains: call it after backward, while the gradients are there.

    Looks for adapters without a gradient or with one that is not finite, factors in another dtype
    than was asked for, layers switched off or merged, weights tied to an adapted layer's or against
    the adapter, trainable parameters that none of the optimizers holds (where some are given), and
    says which implementation runs. All processes must check a model under fully_shard: they gather
    it.
    """
    reshard(model)
    state = ModelAdapters.of(model)
    layers = {name: m for name, m in state.layers.items() if m.adapter is not None}
    _check_whole("health_check", model, layers)
    problems = [problem for name, layer in layers.items() for problem in _problems(name, layer)]
    for place, paths in state.places.items():
        if place.adapter in place.copies and not place.vacant:
            problems += _whole_problems(paths[0], place)
    problems += [_replaced(name, kind) for name, kind in replaced(state.tree).items()]
    problems += tied_since(state.tree, state.whole, state.parameters, state.in_use)
    expected = expected_parameters(state.whole, state.parameters, state.in_use)
    problems += _tied(state.tree, layers, expected)
    if optimizers:
        problems += _not_held(model, optimizers)
    if not layers:
        problems.append("no adapter is active")
    paths = Counter(_path(layer) for layer in layers.values())
    return HealthReport(problems, len(layers), dict(paths))


def _check_whole(operation: str, model: nn.Module, layers: dict[str, Adapted]) -> None:
    check_not_flat(operation, model)
    for name, layer in layers.items():
        matrices = {f"{name}.{f}": getattr(layer, f) for f in ("weight", "lora_A", "lora_B")}
        check_matrices(operation, matrices)


def _replaced(name: str, kind: str) -> str:
    return f"{name}: replaced by a {kind} without the adapter"


def _path(layer: Adapted) -> str:
    if isinstance(layer, nn.Embedding):
        return "embedding"
    update_alone = isinstance(layer, OverQuantised) and layer.lora_A is not None
    return ops.path(layer.lora_A if update_alone else layer.weight)


def _problems(name: str, layer: Adapted) -> list[str]:
    if layer.merged:
        return [f"{name}: merged, so its adapter does not train"]
    if not layer.adapters_enabled:
        return [f"{name}: adapters are disabled"]
    problems = []
    wanted = layer.options.dtype_over(layer.weight.dtype)
    factors = dict(zip(FACTORS, layer.factors, strict=True))
    factors = {f: parameter for f, parameter in factors.items() if parameter is not None}
    for other in {parameter.dtype for parameter in factors.values()} - {wanted}:
        problems.append(f"{name}: factors are {other}, but {wanted} was asked for")
    for key, parameter in layer.named_parameters():
        if key.removeprefix("parametrizations.").startswith(tuple(factors)):  # lora_A, lora_A_orig
            problems += _gradient_problems(f"{name}.{key}", parameter)
    return problems


def _whole_problems(path: str, place: WholePlace) -> list[str]:
    if not place.fits(place.adapter):
        return [f"{path}: the base's module was replaced by one that the adapter's does not fit"]
    problems = []
    wanted = place.copies[place.adapter].dtype
    for part_name, part in Tree(place.module).modules.items():
        for key, parameter in part.named_parameters(recurse=False):
            name = ".".join(filter(None, (path, part_name, key)))
            if wanted is not None and parameter.dtype in NARROW:
                problems.append(f"{name}: {parameter.dtype}, but {wanted} was asked for")
            problems += _gradient_problems(name, parameter)
    return problems


def _gradient_problems(name: str, parameter: nn.Parameter) -> list[str]:
    if parameter.numel() == 0:
        return []
    if not parameter.requires_grad:
        return [f"{name}: frozen (requires_grad is False)"]
    if parameter.grad is None:
        return [f"{name}: no gradient; the layer took no part in the step"]
    try:
        with naming("health_check", {f"{name}.grad": parameter.grad}):
            finite = bool(whole(parameter.grad).isfinite().all())
    except RuntimeError as error:
        return [f"{name}: the gradient cannot be checked: {error}"]
    return [] if finite else [f"{name}: the gradient is not finite"]


def _not_held(model: nn.Module, optimizers: Sequence[Optimizer]) -> list[str]:
    held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    return [
        f"{name}: the optimizer does not hold it; make the optimizer after the adapters"
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in held
    ]


def _tied(tree: Tree, layers: dict[str, Adapted], expected: dict[Place, nn.Parameter]) -> list[str]:
    """Ties but for those that were there when the adapter came, from a folder."""
    owners: dict[int, list[str]] = {}
    for module, names in tree.names.items():
        weight = _base_weight(module)
        if weight is not None:
            owners.setdefault(id(weight), []).append(names[0])
    return [
        f"{name}: the weight is tied to {other}'s"
        for name, layer in layers.items()
        for other in owners.get(id(_base_weight(layer)), [])
        if other != name
        and expected.get((name, "weight"), layer) is not expected.get((other, "weight"))
    ]


def _base_weight(module: nn.Module) -> nn.Parameter | None:
    """None also where the weight is computed, anew at each access."""
    own = isinstance(module, Adapted) and module.merged
    return module._base_weight() if own else module._parameters.get("weight")
