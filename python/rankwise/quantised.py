"""Linear layers over a quantised base: the product is its library's, the update is added to it."""

from __future__ import annotations

import importlib
from functools import cache

from torch import Tensor, nn

from . import ops
from .adapted import Adapted
from .warned import warn

# Exact classes, known by name to import nothing: {module: classes}.
_CLASSES = {
    "bitsandbytes.nn.modules": ("Linear4bit", "LinearNF4", "LinearFP4", "Linear8bitLt"),
}
# Libraries whose layers are refused.
OTHER_LIBRARIES = ("aqlm", "auto_gptq", "awq", "eetq", "gptqmodel", "hqq", "optimum")


def is_quantised(module: nn.Module) -> bool:
    """Whether it is a quantised linear layer that an adapter can be added to."""
    kind = type(module)
    weight = module._parameters.get("weight")  # torchao changes the weight's class alone
    torchao = kind is nn.Linear and type(weight).__module__.startswith("torchao.")
    return torchao or kind.__name__ in _CLASSES.get(kind.__module__, ())


def keep_differentiable(model: nn.Module) -> None:
    """Keeps bitsandbytes' 4-bit layers, adapted or not, from their layout for inference on CPUs.

    On CPUs with AVX512-BF16 the first forward pass in eval() changes to it. Its block scales are
    rounded to bfloat16, and its product has no gradient with respect to inputs, in train() either:
    what lies below would silently not be trained (bitsandbytes 0.50.2, Linear4bit.forward).
    """
    changed = 0
    for layer in model.modules():
        if vars(layer).get("support_avx512bf16_for_cpu", False):
            state = getattr(layer.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                layer.state_dict()  # which changes back
                changed += 1
            layer.support_avx512bf16_for_cpu = False
    if changed:
        warn(
            f"{changed} 4-bit layers were in bitsandbytes' layout for inference on this CPU, as a "
            "forward pass in eval() leaves them, and had their scales rounded to bfloat16; they "
            "have the layout for training again, but not the digits: load the model anew for an "
            "adapter over its exact weights"
        )


class OverQuantised(Adapted):
    """Mixin before a quantised linear layer's class, which goes on to compute the base.

    ``y = base(x) + scaling * ((drop(x) A^T) * E^T) B^T``. The factors are float32, or of a 16-bit
    dtype on request, which inputs must have then. The base's weight cannot be merged.
    """

    _plain_class: type[nn.Linear]

    def become_adapted(self, before: nn.Module) -> OverQuantised:
        """In the place of a quantised layer, with its parameters; without adapters yet."""
        self._become_adapted(transposed=False)
        return _owning(self, before)

    @property
    def _sizes(self) -> tuple[int, int]:
        return self.in_features, self.out_features

    def forward(self, input: Tensor) -> Tensor:
        base = super().forward(input)
        if not self.adapter_in_use:
            return base
        A, B, rank = self._update()
        return ops.lora_update(
            base,
            input.to(base.dtype),
            A,
            B,
            self.lora_E,
            scaling=self.scaling,
            dropout_p=self.dropout if self.training else 0.0,
            rank=rank,
        )

    def check_own_weight(self, operation: str) -> None:
        """Raises RuntimeError: no other weight can take the place of a quantised one."""
        raise RuntimeError(
            f"{operation}: the layer's weight is quantised ({type(self.weight).__name__}), and so "
            "would the sum have to be; load the saved adapter into the dequantised model "
            "(transformers: model.dequantize()), over whose values it was trained, and merge that "
            "one. Nothing was changed"
        )

    def unload(self) -> nn.Module:
        """The quantised layer without adapters; see Unloadable."""
        return _owning(super().unload(), self)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._adapter_repr()}"


def _owning(layer: nn.Module, before: nn.Module) -> nn.Module:
    """The layer in whose weight bitsandbytes notes that it belongs to it."""
    weight = layer.weight
    if getattr(weight, "module", None) is before:
        weight.module = layer
    return layer


@cache
def over(base: type[nn.Linear], triplets: bool) -> type[OverQuantised]:
    """The class of layers over a library's: LoRALinear4bit, for example."""
    name = f"{'Ada' if triplets else ''}LoRA{base.__name__}"
    return type(name, (OverQuantised, base), {"_plain_class": base, "__module__": __name__})


def __getattr__(name: str) -> type[OverQuantised]:
    """Such a class by its name, for pickles."""
    triplets, _, base = name.rpartition("LoRA")
    if triplets in ("", "Ada"):
        if base == "Linear":
            return over(nn.Linear, bool(triplets))
        for module, classes in _CLASSES.items():
            if base in classes:
                return over(getattr(importlib.import_module(module), base), bool(triplets))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
