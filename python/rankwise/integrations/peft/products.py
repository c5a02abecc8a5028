"""PEFT's layers over matrix products: the base's and the adapters' in few operators."""

from __future__ import annotations

from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.module import _has_any_global_hook as any_global_hook

from ... import ops
from .decision import PLAIN, Adapter, Plan, dropout_of, fitting, plain_parameters, unhooked
from .fused import Fused
from .terms import Term, add_term, term_of

HOOKED = "hooks on the adapter"


class FusedProduct(Fused):
    """What layers over products have in common, of LoRA and of AdaLoRA.

    A base that is a plain linear layer is computed with the first adapter in one operator. One that
    has hooks, is quantised or has code of its own computes itself, and the adapters are added.
    """

    def _term(self, adapter: Adapter) -> Term | str:
        raise NotImplementedError

    def _computed(self, plan: Plan, x: Tensor) -> Tensor | str:
        if any_global_hook():
            return "hooks on all modules"
        _, base, _, product, _, adapters = plan
        parameters = plain_parameters(base, product)
        dtype = x.dtype if parameters is None else parameters["weight"].dtype
        terms = []
        for adapter in adapters:
            term = self._term(adapter)
            if type(term) is str:
                return term
            misfit = fitting(x, dtype, term[0], term[1])
            if misfit is not None:
                return misfit
            terms.append(term)
        if parameters is None:
            y = self.base_layer(x)
        else:
            weight = parameters["weight"] if product is nn.Linear else parameters["weight"].t()
            A, B, E, of_B, scaling, p = terms.pop(0)
            bias = parameters["bias"]
            y = ops.lora_linear(x, weight, bias, A, B, E, scaling=scaling, dropout_p=p)
            if of_B is not None:
                y = y + (of_B * scaling).to(y.dtype)
        for term in terms:
            y = add_term(y, x, term)
        return y


class FusedModules(FusedProduct):
    """Of layers whose factors are nn.Linear modules: LoRA's."""

    def _containers(self, modules: dict) -> tuple[dict, dict, dict]:
        A, B, dropout = modules["lora_A"], modules["lora_B"], modules["lora_dropout"]
        return A._modules, B._modules, dropout._modules

    def _obstacle(self, adapter: Adapter) -> str | None:
        obstacle = super()._obstacle(adapter)
        for factor in (adapter.lora_A, adapter.lora_B):
            if obstacle is None and type(factor) is not nn.Linear:
                return f"a factor is a {type(factor).__name__}"
        return obstacle

    def _term(self, adapter: Adapter) -> Term | str:
        name, A, B, dropout = adapter
        of_A, of_B, p = unhooked(A), unhooked(B), dropout_of(dropout)
        if of_A is None or of_B is None or p is None:
            return HOOKED
        of_A, of_B = of_A["_parameters"], of_B["_parameters"]  # without what is parametrised
        if of_A.get("bias", ...) is not None:
            return "lora_A has a bias"
        A, B, bias = of_A.get("weight"), of_B.get("weight"), of_B.get("bias", ...)
        return term_of(A, B, None, bias, self.scaling[name], p)


class FusedTriplets(FusedProduct):
    """Of layers whose factors are parameters, with lora_E between them: AdaLoRA's."""

    def _containers(self, modules: dict) -> tuple[dict, dict, dict]:
        A, B, dropout = modules["lora_A"], modules["lora_B"], modules["lora_dropout"]
        return A._parameters, B._parameters, dropout._modules

    def _term(self, adapter: Adapter) -> Term | str:
        name, A, B, dropout = adapter
        p = dropout_of(dropout)
        if p is None:
            return HOOKED
        E, first_rank = self._modules["lora_E"]._parameters.get(name), self.first_rank(name)
        if first_rank is None:
            return "its first rank is not known yet"
        scaling = self.scaling[name]
        if type(scaling) is float or type(scaling) is int:
            scaling = scaling / (first_rank + 1e-5)
        return term_of(A, B, E, None, scaling, p)

    def first_rank(self, name: str) -> float | None:
        """PEFT's ``ranknum``, by which updates are divided; read once, for it may be on a GPU."""
        number, known = self._modules["ranknum"]._parameters.get(name), self.fused_calls.first_ranks
        if name in known and known[name][0] is number:
            if is_compiling() or known[name][1] == number._version:
                return known[name][2]
        if is_compiling() or type(number) not in PLAIN or number.is_inference():
            return None
        known[name] = number, number._version, float(number)
        return known[name][2]
