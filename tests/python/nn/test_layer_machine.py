# Random sequences of everything a layer can do, against a plain float64 model of it.
from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from layer_cases import (
    KINDS,
    assert_nearest,
    computed,
    exact_weight,
    example,
    factors,
    make,
    randomise,
)
from machines import run_machine
from tolerances import assert_close, assert_same_bits

from rankwise.config import AdapterOptions

NAMES = st.sampled_from(["default", "a", "ab", "b"])
SEEDS = st.integers(0, 2**20)
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


@dataclass
class Model:
    """What the layer should hold: base bits, each adapter's factors and scaling, flags."""

    base: torch.Tensor
    adapters: dict[str, tuple[dict[str, torch.Tensor], float]] = field(default_factory=dict)
    active: str | None = "default"
    merged: bool = False
    enabled: bool = True
    merged_weight: torch.Tensor | None = None

    def weight(self) -> torch.Tensor:
        """The float64 weight that forward should use, in the base's layout."""
        if self.active is None or not self.enabled:
            return self.base.double()
        if self.merged:
            return self.merged_weight.double()
        return self.sum()

    def sum(self) -> torch.Tensor:
        values, scaling = self.adapters[self.active]
        A = values["lora_A"].double()
        A = A * values["lora_E"].double() if "lora_E" in values else A
        delta = scaling * (values["lora_B"].double() @ A)
        return self.base.double() + (delta if delta.shape == self.base.shape else delta.t())

    def to(self, dtype: torch.dtype) -> Model:
        adapters = {
            name: ({k: v.to(dtype) for k, v in values.items()}, scaling)
            for name, (values, scaling) in self.adapters.items()
        }
        merged = None if self.merged_weight is None else self.merged_weight.to(dtype)
        return replace(self, base=self.base.to(dtype), adapters=adapters, merged_weight=merged)


def snapshot(layer) -> tuple[dict[str, torch.Tensor], float]:
    return {n: f.detach().clone() for n, f in factors(layer).items()}, layer.scaling


class LayerMachine(RuleBasedStateMachine):
    kind = "linear"

    @initialize(dtype=DTYPES)
    def start(self, dtype):
        self.layer = make(self.kind, dtype).eval()
        self.model = Model(self.layer.weight.detach().clone())
        self.model.adapters["default"] = snapshot(self.layer)
        self.add("a", rank=2, seed=0)

    @rule()
    def merge(self):
        if self.model.active is None:
            with pytest.raises(RuntimeError, match="no adapter is active"):
                self.layer.merge()
        elif self.model.merged:
            with pytest.warns(UserWarning, match="merged already"):
                assert self.layer.merge() is None
        else:
            report = self.layer.merge()
            self.model.merged = True
            assert_nearest(self.layer.weight, self.model.sum())
            self.model.merged_weight = self.layer.weight.detach().clone()
            changed = self.model.merged_weight != self.model.base
            assert report.changed == int(changed.sum())

    @rule()
    def unmerge(self):
        if self.model.merged:
            self.layer.unmerge()
        else:
            with pytest.warns(UserWarning, match="not merged"):
                self.layer.unmerge()
        self.model.merged, self.model.merged_weight = False, None

    @rule(name=st.none() | NAMES)
    def activate(self, name):
        wanted = name if name in self.model.adapters else None
        if self.model.merged and name != self.model.active:
            with pytest.raises(RuntimeError, match="unmerge"):
                self.layer.activate_adapter(name)
        else:
            self.layer.activate_adapter(name)
            self.model.active = wanted

    @rule(name=NAMES, rank=st.integers(0, 5), seed=SEEDS)
    def add(self, name, rank, seed):
        options = AdapterOptions(rank=rank, alpha=float(rank))
        if name in self.model.adapters:
            with pytest.raises(ValueError, match="already"):
                self.layer.add_adapter(name, options)
            return
        self.layer.add_adapter(name, options)
        if self.model.merged:  # its factors can be looked at only when it is active
            self.layer.delete_adapter(name)
            return
        self.layer.activate_adapter(name)
        randomise(self.layer, seed)
        self.model.adapters[name] = snapshot(self.layer)
        self.layer.activate_adapter(self.model.active)

    @rule(name=NAMES)
    def delete(self, name):
        if name not in self.model.adapters:
            with pytest.raises(KeyError, match="delete_adapter: adapters are"):
                self.layer.delete_adapter(name)
        elif self.model.merged and name == self.model.active:
            with pytest.raises(RuntimeError, match="unmerge"):
                self.layer.delete_adapter(name)
        else:
            self.layer.delete_adapter(name)
            del self.model.adapters[name]
            self.model.active = None if name == self.model.active else self.model.active

    @rule(enabled=st.booleans())
    def switch(self, enabled):
        self.layer.adapters_enabled = enabled
        self.model.enabled = enabled

    @rule(seed=SEEDS)
    @precondition(lambda self: self.model.active is not None and not self.model.merged)
    def train(self, seed):
        randomise(self.layer, seed)
        self.model.adapters[self.model.active] = snapshot(self.layer)

    @rule(seed=SEEDS, strict=st.booleans())
    def load_plain_state(self, seed, strict):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randint(-32, 33, self.model.base.shape, generator=generator) / 16
        state = {"weight": weight.to(self.model.base.dtype)}
        if getattr(self.layer, "bias", None) is not None:
            state["bias"] = self.layer.bias.detach().clone()
        if self.model.merged:
            with pytest.raises(RuntimeError, match="a merged layer loads no state"):
                self.layer.load_state_dict(state, strict=strict)
        else:
            self.model.base = state["weight"].clone()
            self.layer.load_state_dict(state, strict=strict)

    @rule()
    def copy(self):
        original, self.layer = self.layer, copy.deepcopy(self.layer)
        with torch.no_grad():
            for parameter in original.parameters():
                parameter.fill_(float("nan"))

    @rule(dtype=DTYPES)
    def change_dtype(self, dtype):
        self.layer.to(dtype)
        self.model = self.model.to(dtype)

    @invariant()
    def flags_are_the_models(self):
        assert self.layer.merged == self.model.merged
        assert self.layer.adapter == self.model.active
        assert sorted(self.layer.adapter_names) == sorted(self.model.adapters)
        trained = [n for n, p in self.layer.named_parameters() if p.requires_grad]
        assert trained == list(factors(self.layer))

    @invariant()
    def base_is_bit_equal(self):
        if not self.model.merged:
            assert_same_bits(self.layer.weight, self.model.base, "base")

    @invariant()
    def adapters_are_bit_equal(self):
        if self.model.active is not None:
            values, scaling = self.model.adapters[self.model.active]
            assert self.layer.scaling == scaling
            for name, factor in factors(self.layer).items():
                assert_same_bits(factor, values[name], name)

    @invariant()
    def forward_is_the_models(self):
        x = example(self.layer)
        expected, size = computed(self.layer, self.model.weight(), x)
        with torch.no_grad():
            assert_close(self.layer(x), expected, size, "output")

    def teardown(self):
        """After all: unmerged, the base is what was loaded last."""
        if not hasattr(self, "layer"):
            return
        if self.layer.merged:
            self.layer.unmerge()
        assert_same_bits(self.layer.weight, self.model.base, "base at the end")


@pytest.mark.parametrize("kind", KINDS)
def test_any_sequence_of_operations(kind):
    machine = type("Machine", (LayerMachine,), {"kind": kind})
    run_machine(machine, steps=30)


def test_the_model_itself_agrees_with_a_layer():
    """The oracle of the machine: one sum by hand."""
    layer = make("adalora", torch.float64)
    model = Model(layer.weight.detach().clone(), {"default": snapshot(layer)})
    torch.testing.assert_close(model.sum(), exact_weight(layer, layer.weight), rtol=0, atol=0)
