"""Our subclasses of PEFT's layers, which a layer's __class__ is set to.

All but forward is PEFT's, and so is forward wherever our operators are not meant for a call.
"""

from __future__ import annotations

import torch
from peft.tuners import adalora, lora
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as any_global_hook

from ... import ops
from .decision import Adapter, Calls, Plan, factors_fit, plain_parameters
from .fused import Fused
from .products import FusedModules, FusedTriplets
from .terms import term_of


class Linear(FusedModules, lora.Linear):
    pass


class SVDLinear(FusedTriplets, adalora.SVDLinear):
    pass


class Embedding(Fused, lora.Embedding):
    def _containers(self, modules: dict) -> tuple[dict, dict, dict]:
        A, B = modules["lora_embedding_A"], modules["lora_embedding_B"]
        return A._parameters, B._parameters, modules["lora_dropout"]._modules

    def _obstacle(self, adapter: Adapter) -> str | None:
        if self.tp_layer is not None or self.input_fns or self.output_fns:
            return "tensor-parallel"
        return super()._obstacle(adapter)

    def _computed(self, plan: Plan, x: Tensor) -> Tensor | str:
        base = plan.base
        parameters = plain_parameters(base, plan.product)
        if parameters is None:
            return f"the base, a {type(base).__name__}, computes itself"
        weight = parameters["weight"]
        if any_global_hook():
            return "hooks on all modules"
        if "embed_scale" in base.__dict__ or "embed_scale" in base._buffers:
            return "the base scales its embeddings"
        if base.max_norm is not None or base.scale_grad_by_freq or base.sparse:
            return "max_norm, scale_grad_by_freq or sparse"
        if x.dtype is not torch.int64 and x.dtype is not torch.int32:
            return f"{x.dtype} indices".replace("torch.", "")
        terms = []
        for name, A, B, _ in plan.adapters:
            term = term_of(A, B, None, None, self.scaling[name], 0.0)
            if type(term) is str:
                return term
            if not factors_fit(weight.dtype, A, B):
                return f"{A.dtype} adapter on {weight.dtype} base".replace("torch.", "")
            terms.append(term)
        A, B, _, _, scaling, _ = terms[0]
        y = ops.lora_embedding(x, weight, A, B, scaling=scaling, padding_idx=base.padding_idx)
        for A, B, _, _, scaling, _ in terms[1:]:
            y = y + (self._embed(x, A.T) @ B.T) * scaling
        return y.to(weight.dtype)


FUSED = {
    lora.Linear: Linear,
    lora.Embedding: Embedding,
    adalora.SVDLinear: SVDLinear,
}
_QUANTISED = ("peft.tuners.lora.bnb", "peft.tuners.adalora.bnb", "peft.tuners.lora.torchao")


def take(module: nn.Module) -> nn.Module:
    """The module, one of ours from now on where it is of one of those classes."""
    if type(module).__module__.endswith(_QUANTISED):
        from . import quantised  # noqa: F401  adds its classes to FUSED
    fused = FUSED.get(type(module))
    if fused is not None:
        module.fused_calls = Calls()
        module.__class__ = fused
        if isinstance(module, FusedTriplets):
            for name in module.ranknum:
                module.first_rank(name)
    return module


def give_back(module: nn.Module) -> None:
    """Undoes take()."""
    if isinstance(module, Fused):
        module.__class__ = next(stock for stock, ours in FUSED.items() if ours is type(module))
        del module.fused_calls
