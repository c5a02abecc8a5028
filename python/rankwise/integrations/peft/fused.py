"""What PEFT's layers with our operators in forward have in common."""

from __future__ import annotations

from torch import Tensor, nn
from torch.compiler import is_compiling

from .decision import (
    ARGUMENTS,
    DISABLED,
    MERGED,
    NO_ADAPTER,
    PLAIN,
    VARIANT,
    Adapter,
    Calls,
    Plan,
    has_arguments,
    plain_parameters,
    product_of,
)


class Fused:
    """Mixin before one of PEFT's layers, which has a record of its calls.

    The classes have the names of PEFT's: some of PEFT's code looks at names, and so do users.
    """

    fused_calls: Calls

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        calls = None if is_compiling() else self.fused_calls
        result = self._fused(calls, x, args, kwargs)
        reason = result if type(result) is str else None
        if calls is not None:
            calls.note(reason)
        return result if reason is None else super().forward(x, *args, **kwargs)

    def _fused(self, calls: Calls | None, x: Tensor, args: tuple, kwargs: dict) -> Tensor | str:
        """The result, or why PEFT must compute it."""
        if (args or kwargs) and has_arguments(args, kwargs):
            return ARGUMENTS
        state = self.__dict__
        if state["_disable_adapters"]:
            return DISABLED
        if state["merged_adapters"]:
            return MERGED
        plan = None if calls is None else calls.plan
        if plan is None or not self._holds(plan):
            plan = self._new_plan()
            if type(plan) is str:
                return plan
            if calls is not None:
                calls.plan = plan
        if type(x) not in PLAIN:
            return f"input is a {type(x).__name__}"
        return self._computed(plan, x)

    def _containers(self, modules: dict) -> tuple[dict, dict, dict]:
        """{adapter: lora_A}, {adapter: lora_B} and {adapter: dropout}, from the layer's modules."""
        raise NotImplementedError

    def _holds(self, plan: Plan) -> bool:
        active, base, base_class, _, watched, _ = plan
        state = self.__dict__
        modules = state["_modules"]
        if modules["base_layer"] is not base or base.__class__ is not base_class:
            return False
        if state["_active_adapter"] != active:
            return False
        As, Bs, dropouts = self._containers(modules)
        for name, A, B, dropout in watched:
            if As.get(name) is not A or Bs.get(name) is not B or dropouts.get(name) is not dropout:
                return False
        return True

    def _new_plan(self) -> Plan | str:
        active, base = self._active_adapter, self._modules["base_layer"]
        names = [active] if isinstance(active, str) else list(active)
        As, Bs, dropouts = self._containers(self._modules)
        watched = [Adapter(n, As.get(n), Bs.get(n), dropouts.get(n)) for n in names]
        adapters = [adapter for adapter in watched if adapter.lora_A is not None]
        if not adapters:
            return NO_ADAPTER
        for adapter in adapters:
            obstacle = self._obstacle(adapter)
            if obstacle is not None:
                return obstacle
        active = active if isinstance(active, str) else list(active)
        return Plan(active, base, type(base), product_of(base), tuple(watched), tuple(adapters))

    def _obstacle(self, adapter: Adapter) -> str | None:
        """What keeps an adapter from our operators until a method of PEFT changes it."""
        if adapter.name in self.lora_variant:
            return VARIANT
        if type(adapter.dropout) not in (nn.Identity, nn.Dropout):
            return f"dropout is a {type(adapter.dropout).__name__}"
        return None

    def _computed(self, plan: Plan, x: Tensor) -> Tensor | str:
        raise NotImplementedError

    # What a report tells

    def obstacles(self) -> dict[str, str | None]:
        """{adapter: what keeps it from our operators, None where nothing does}."""
        As, Bs, dropouts = self._containers(self._modules)
        return {n: self._obstacle(Adapter(n, As[n], Bs[n], dropouts.get(n))) for n in As}

    @property
    def factors(self) -> list[Tensor]:
        """lora_A of all adapters."""
        found = self._containers(self._modules)[0].values()
        return [getattr(A, "weight", A) for A in found]

    @property
    def base_computes_itself(self) -> bool:
        """Whether our operators do not read the base's weight."""
        base = self._modules["base_layer"]
        return plain_parameters(base, product_of(base)) is None
