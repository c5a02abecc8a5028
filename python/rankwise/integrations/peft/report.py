"""What accelerate() took and what it left, and what became of the calls since."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable

import torch
from peft.tuners.adalora.layer import SVDConv2d
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .allocator import PeftRankAllocator
from .decision import VARIANT
from .fused import Fused

FEW = 4  # of so many layers or fewer, names are printed
_KINDS = {
    (lora._ConvNd, SVDConv2d): "convolution",
    (lora.MultiheadAttention,): "attention with one weight for all",
    (lora.ParamWrapper,): "parameter of a module (target_parameters)",
}


class Report:
    """What accelerate() did; print it.

    Args:
        taken: {name: class} of the layers that our operators compute.
        beside: {name: class of its base} of those whose base computes itself: it is quantised, has
            hooks or code of its own.
        left: {name: why} of the PEFT layers that PEFT computes as before.
        dtypes: the pairs of types (adapter, base) of the layers taken.
        allocator: of a model in AdaLoRA training, else None.
    """

    def __init__(self, model: nn.Module, undo: Callable[[nn.Module], None]) -> None:
        self._model, self._undo = model, undo
        self.taken: dict[str, str] = {}
        self.beside: dict[str, str] = {}
        self.left: dict[str, str] = {}
        self.dtypes: set[tuple[torch.dtype, torch.dtype]] = set()
        self.allocator: PeftRankAllocator | None = None
        read = set()  # by their owner, and never called
        for name, module in model.named_modules():
            if isinstance(module, lora.MultiheadAttention):
                read.add(module.base_layer.out_proj)
            if isinstance(module, BaseTunerLayer) and module not in read:
                self._note(name, module)
            elif isinstance(vars(module).get("rankallocator"), PeftRankAllocator):
                self.allocator = module.rankallocator

    def _note(self, name: str, layer: BaseTunerLayer) -> None:
        kind = type(layer).__name__
        why = _why_left(layer)
        if why is not None:
            self.left[name] = f"{kind}: {why}"
            return
        self.taken[name] = kind
        if layer.base_computes_itself:
            self.beside[name] = type(layer.base_layer).__name__
        self.dtypes |= {(a.dtype, layer.weight.dtype) for a in layer.factors}

    def calls(self) -> dict[str, Counter]:
        """{layer: its calls since: "fused", and by the reason why PEFT computed them}."""
        layers = {n: m for n, m in self._model.named_modules() if isinstance(m, Fused)}
        return {
            name: Counter(fused=layer.fused_calls.fused) + layer.fused_calls.others
            for name, layer in layers.items()
        }

    def restore(self) -> None:
        """Undoes accelerate()."""
        self._undo(self._model)

    def __str__(self) -> str:
        lines = [f"taken: {_counts(self.taken) or 'nothing'}"]
        if self.beside:
            lines.append(f"  beside a base that computes itself: {_counts(self.beside)}")
        for adapter, base in sorted(self.dtypes, key=str):
            lines.append(f"  adapters {adapter} over {base}".replace("torch.", ""))
        if self.allocator is not None:
            lines.append(f"ranks: {self.allocator!r}")
        groups = defaultdict(list)
        for name, why in self.left.items():
            groups[why].append(name)
        for why, names in groups.items():
            few = f" ({', '.join(names)})" if len(names) <= FEW else ""
            lines.append(f"left to PEFT: {len(names)} {why}{few}")
        return "\n".join(lines)

    __repr__ = __str__


def _counts(kinds: dict[str, str]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in sorted(Counter(kinds.values()).items()))


def _why_left(layer: BaseTunerLayer) -> str | None:
    """What keeps all adapters of a layer from our operators; None where nothing does."""
    if not isinstance(layer, Fused):
        known = (why for kinds, why in _KINDS.items() if isinstance(layer, kinds))
        return next(known, f"no operator for {type(layer).__module__}")
    obstacles = layer.obstacles()
    if not obstacles or None in obstacles.values():
        return None
    name, why = next(iter(obstacles.items()))
    if why == VARIANT:
        return type(layer.lora_variant[name]).__name__
    return why
