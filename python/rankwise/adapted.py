"""What all adapted layers share: named adapters over one frozen base, and their state."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .computed import not_a_parameter
from .config import AdapterOptions, factor_dtypes
from .devices import FACTORS, follow_base, values_kept
from .directions import ORDER, Directed, Directions
from .first_factors import FIRST
from .sharding import ADD_BEFORE, check_unsharded
from .stand_in import adopt_hooks
from .stored_adapter import HeldAdapter, StoredAdapter
from .unloading import Unloadable


def check_adapter_name(operation: str, name: str) -> None:
    """Adapter names are parts of module names: no separators, no attribute of a module."""
    word = isinstance(name, str) and name and "." not in name and "/" not in name
    if not word or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"{operation}: name must be a word without '.' or '/' that names no method of "
            f"nn.ModuleDict, got {name!r}"
        )


def is_adapter_key(key: str, prefix: str) -> bool:
    """Whether a state-dict key under `prefix` is a factor of the active or another adapter."""
    return key.startswith(prefix) and key.removeprefix(prefix).split(".")[0] in (
        *FACTORS,
        ORDER,
        FIRST,
        "adapters",
    )


def _keep_forward(layer: nn.Module, args: tuple) -> None:
    """A hook that does nothing."""


def _forgive_missing_adapters(layer: Adapted, incompatible) -> None:
    """After a plain layer's state was loaded: the adapters keep their own values."""
    prefix, layer._plain_state = layer._plain_state, None
    if prefix is not None:
        missing = incompatible.missing_keys
        missing[:] = [key for key in missing if not is_adapter_key(key, prefix)]
        follow_base(layer)


class Adapted(Directed, Unloadable):
    """Mixin before nn.Linear or nn.Embedding.

    At most one adapter is active; its factors are the layer's own parameters, trainable. The others
    wait in ``adapters``, frozen. The base is never written.
    """

    _own_hooks = (_keep_forward, _forgive_missing_adapters)

    def _become_adapted(self, transposed: bool) -> None:
        """The state of a layer without adapters. `transposed`: weight is stored [in, out]."""
        self._become_mergeable(transposed)
        self.adapters = nn.ModuleDict().train(self.training)
        self._plain_state: str | None = None
        self.shared_input = None  # SharedInput: share_inputs
        self.register_load_state_dict_post_hook(_forgive_missing_adapters)
        self._clear_active()

    def _freeze_and_add(self, options: AdapterOptions) -> None:
        """Freezes the base and adds the first adapter, "default"."""
        adapter = self.new_adapter(options)
        self.requires_grad_(False)
        self.adapters["default"] = adapter
        self.activate_adapter("default")
        self.take_place()

    def take_place(self) -> None:
        """Once it stands where a plain layer was, with whose hooks it shares their container."""
        adopt_hooks(self)
        # nn.TransformerEncoderLayer's inference fast path reads weights and would pass the adapter
        # over; PyTorch does not take it when a layer has a hook.
        if _keep_forward not in self._forward_pre_hooks.values():
            self.register_forward_pre_hook(_keep_forward)

    # The active adapter

    def _clear_active(self) -> None:
        self.adapter: str | None = None
        self.options: AdapterOptions | None = None
        self.rank = 0
        self.directions = None
        for name in FACTORS:
            self.register_parameter(name, None)
        self.register_module(FIRST, None)

    @property
    def adapter_in_use(self) -> bool:
        """Whether forward adds the active adapter's update to the base."""
        return self.adapter is not None and self.adapters_enabled and not self.merged

    @property
    def scaling(self) -> float:
        """The factor of the update: alpha / rank or alpha / sqrt(rank) at creation."""
        return self.options.scaling if self.options else 0.0

    @property
    def alpha(self) -> float:
        return self.options.alpha if self.options else 0.0

    @property
    def dropout(self) -> float:
        return self.options.dropout if self.options else 0.0

    @property
    def capacity(self) -> int:
        """Directions allocated; `rank` of them are used."""
        return 0 if self.lora_A is None else self.lora_A.shape[0]

    # Named adapters

    @property
    def adapter_names(self) -> list[str]:
        """All adapters of this layer, the active one first."""
        return ([self.adapter] if self.adapter is not None else []) + list(self.adapters)

    def holder_of(self, name: str) -> Adapted | StoredAdapter:
        """Whose parameters an adapter's factors are: the layer's own while it is active."""
        if name not in self.adapter_names:
            raise KeyError(f"held_adapter: adapters are {self.adapter_names}, got {name!r}")
        return self if name == self.adapter else self.adapters[name]

    def held_adapter(self, name: str) -> HeldAdapter:
        """An adapter by name, active or not.

        Raises:
            KeyError: there is none of that name.
        """
        holder = self.holder_of(name)
        return HeldAdapter(*holder.factors, holder.options, holder.rank, holder.lora_first)

    def add_adapter(self, name: str, options: AdapterOptions) -> None:
        """A new adapter, not active."""
        check_adapter_name("add_adapter", name)
        if name in self.adapter_names:
            raise ValueError(f"add_adapter: there is an adapter {name!r} already")
        self.adapters[name] = self.new_adapter(options)

    def activate_adapter(self, name: str | None) -> None:
        """Makes `name` the active adapter; None, or a name not here, leaves the base alone."""
        if name == self.adapter:
            return
        if self.merged:
            raise RuntimeError("activate_adapter: the layer is merged; call unmerge() first")
        self.check_switch(name)
        if self.adapter is not None:
            stored = dict(zip(FACTORS, self.factors, strict=True))
            waiting = StoredAdapter(
                stored, self.options, self.rank, self.directions, self.lora_first
            )
            self.adapters[self.adapter] = waiting.train(self.training)
            self._clear_active()
        if name in self.adapters:
            chosen = self.adapters.pop(name)
            for factor in FACTORS:
                self.register_parameter(factor, getattr(chosen, factor))
            chosen.requires_grad_(True)
            self.adapter, self.options, self.rank = name, chosen.options, chosen.rank
            self.directions, self.lora_first = chosen.directions, chosen.lora_first

    def check_switch(self, name: str | None) -> None:
        """Refuses to move factors that FSDP has in its books, or that something computes.

        Raises:
            ValueError: activate_adapter(name) would.
        """
        if name == self.adapter:
            return
        for holder in (self, self.adapters[name] if name in self.adapters else None):
            if holder is not None:
                factors = dict(zip(FACTORS, holder.factors, strict=True))
                check_unsharded(
                    "activate_adapter", factors, "activate it before the model is sharded"
                )
                for factor in [factor for factor in FACTORS if factors[factor] is not None]:
                    found = not_a_parameter(holder, factor)
                    if found is not None:
                        raise ValueError(f"activate_adapter: the layer's {found}")

    def delete_adapter(self, name: str) -> None:
        """Forgets an adapter; when it was active the layer computes the base alone."""
        if name not in self.adapter_names:
            raise KeyError(f"delete_adapter: adapters are {self.adapter_names}, got {name!r}")
        if name == self.adapter:
            self.activate_adapter(None)
        del self.adapters[name]

    def new_adapter(self, options: AdapterOptions) -> StoredAdapter:
        """A freshly initialised adapter for this layer, not attached to it.

        Raises:
            ValueError: a dtype that does not fit the base's.
        """
        inputs, outputs = self._sizes
        if options.within_layer:
            options = options.within(min(inputs, outputs))
        capacity = options.rank if options.capacity is None else options.capacity
        weight = self._base_weight()
        check_unsharded("adapter", {"weight": weight}, ADD_BEFORE)
        dtype = options.dtype_over(weight.dtype)
        if dtype not in factor_dtypes(weight.dtype):
            wanted = f"{weight.dtype} like the base's, or torch.float32 over a 16-bit base"
            if not weight.dtype.is_floating_point:
                wanted = "torch.float32, torch.bfloat16 or torch.float16 over a quantised base"
            raise ValueError(f"adapter: adapter_dtype must be {wanted}, got {dtype}")

        def new(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(size, device=weight.device, dtype=dtype))

        factors = {"lora_A": new(capacity, inputs), "lora_B": new(outputs, capacity)}
        factors["lora_E"] = new(capacity, 1) if options.triplets else None
        rank = options.rank_at_first
        movable = options.triplets or capacity > rank  # by an allocator
        directions = Directions(capacity, rank) if movable else None
        adapter = StoredAdapter(factors, options, rank, directions).train(self.training)
        self._reset_adapter(adapter)
        return adapter

    def reset_parameters(self) -> None:
        """Gives the base, and the active adapter, their first distributions anew."""
        super().reset_parameters()
        if vars(self).get("adapter") is not None:
            self._reset_adapter(self)

    @torch.no_grad()
    def _reset_adapter(self, holder: StoredAdapter | Adapted) -> None:
        holder.lora_first = None  # another base's
        for factor in holder.factors:
            if factor is not None:
                factor.zero_()
        if holder.rank > 0:
            A, B = holder.lora_A[: holder.rank], holder.lora_B[:, : holder.rank]
            self._initialise(A, B, holder.options)

    def _initialise(self, A: Tensor, B: Tensor, options: AdapterOptions) -> None:
        if options.triplets:
            A.normal_(std=0.02)
            B.normal_(std=0.02)
        elif options.init in (None, "kaiming"):
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        elif options.init == "gaussian":
            A.normal_(std=1 / options.rank)
        else:
            B.normal_(std=1 / options.rank)

    # nn.Module

    def state_dict(self, *args, destination=None, prefix: str = "", keep_vars: bool = False):
        """While merged a plain layer's state, so that no loader adds the update twice."""
        state = super().state_dict(
            *args, destination=destination, prefix=prefix, keep_vars=keep_vars
        )
        if self.merged or self.in_merged_model:
            for key in [key for key in state if is_adapter_key(key, prefix)]:
                del state[key]
        return state

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
    ) -> None:
        if self.merged:
            errors.append(
                f"{prefix.removesuffix('.')}: a merged layer loads no state; unmerge first"
            )
            for key in [key for key in state_dict if is_adapter_key(key, prefix)]:
                del state_dict[key]  # nor do the adapters that wait in it
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected, errors
        )
        plain = not any(is_adapter_key(key, prefix) for key in state_dict)
        self._plain_state = prefix if plain else None

    def _apply(self, fn, recurse: bool = True):
        with values_kept(self):
            return super()._apply(fn, recurse)

    def _adapter_repr(self) -> str:
        if self.adapter is None:
            return "no active adapter"
        text = f"rank={self.rank}, alpha={self.alpha:g}, dropout={self.dropout:g}"
        return f"{text}, adapter={self.adapter!r}{', merged' if self.merged else ''}"
