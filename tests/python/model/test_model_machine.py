# Random sequences of everything a model with adapters can do, against plain float64 weights.
from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

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
from machine_net import (
    ALLOCATORS,
    CONFIGS,
    OPTIMIZERS,
    STEPS,
    TOKENS,
    Net,
    assert_model,
    weights_of,
)
from machines import run_machine

import rankwise as rw
from rankwise.model_adapters import ModelAdapters

NAMES = st.sampled_from(["default", "a", "ab", "b"])


class ModelMachine(RuleBasedStateMachine):
    folder = None

    @initialize(kind=st.sampled_from(list(CONFIGS)))
    def start(self, kind):
        torch.manual_seed(0)
        plain = Net()
        self.base = {key: p.detach().clone() for key, p in plain.named_parameters()}
        self.model = plain
        self.begin("default", kind)

    def begin(self, name, kind):
        rw.apply_lora(self.model.eval(), CONFIGS[kind], name)
        self.kinds = {name: kind}
        self.adapters = {name: weights_of(self.model, name)}
        self.active, self.merged = name, False

    # Adapters by name

    @rule(name=NAMES, kind=st.sampled_from(list(CONFIGS)), pissa=st.booleans())
    def add(self, name, kind, pissa):
        if name in self.adapters:
            with pytest.raises(ValueError, match="already"):
                rw.add_adapter(self.model, name, CONFIGS[kind])
            return
        first = rw.PiSSA() if pissa and kind in ("lora", "rslora") else None
        if first is not None and self.merged:
            first = None
        rw.add_adapter(self.model, name, CONFIGS[kind], first)
        self.kinds[name] = kind
        self.adapters[name] = weights_of(self.model, name)
        for key, weight in self.adapters[name].items():
            torch.testing.assert_close(weight, self.base[key], rtol=0, atol=1e-12)

    @rule(name=st.none() | NAMES)
    def activate(self, name):
        if name is not None and name not in self.adapters:
            with pytest.raises(KeyError, match="adapters are"):
                rw.activate_adapter(self.model, name)
        elif self.merged:
            with pytest.raises(RuntimeError, match="unmerge"):
                rw.activate_adapter(self.model, name)
        else:
            rw.activate_adapter(self.model, name)
            self.active = name

    @rule(name=NAMES)
    def delete(self, name):
        if name not in self.adapters:
            with pytest.raises(KeyError, match="adapters are"):
                rw.delete_adapter(self.model, name)
        elif self.merged and name == self.active:
            with pytest.raises(RuntimeError, match="unmerge"):
                rw.delete_adapter(self.model, name)
        else:
            rw.delete_adapter(self.model, name)
            del self.adapters[name], self.kinds[name]
            self.active = None if name == self.active else self.active

    # The base

    @rule()
    def merge(self):
        if self.active is None:
            with pytest.raises(RuntimeError, match="no adapter is active"):
                rw.merge(self.model)
        elif self.merged:
            with pytest.warns(UserWarning, match="merged already"):
                rw.merge(self.model)
        else:
            rw.merge(self.model)
            self.merged = True

    @rule()
    def unmerge(self):
        expected = nullcontext() if self.merged else pytest.warns(UserWarning, match="not merged")
        with expected:
            rw.unmerge(self.model)
        self.merged = False

    @rule(name=NAMES, kind=st.sampled_from(list(CONFIGS)))
    def unload_and_begin_anew(self, name, kind):
        expected = self.expected() if self.merged else self.base
        rw.unload(self.model)
        if self.merged:
            self.base = {key: p.detach().clone() for key, p in self.model.named_parameters()}
        assert not [m for m in self.model.modules() if type(m).__module__.startswith("rankwise")]
        assert dict(self.model.named_parameters()).keys() == self.base.keys()
        assert_model(self.model, expected)
        self.begin(name, kind)

    # Training

    @precondition(lambda self: self.active is not None)
    @rule(
        seed=st.integers(0, 99),
        optimizer=st.sampled_from(list(OPTIMIZERS)),
        steps=st.integers(1, STEPS),
    )
    def train(self, seed, optimizer, steps):
        """Part of a schedule, or all of it."""
        kind = self.kinds[self.active]
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if self.merged:
            with pytest.raises(RuntimeError, match="unmerge"):
                self.model.train()(TOKENS)
            self.model.eval()
            return
        torch.manual_seed(seed)
        stepper = OPTIMIZERS[optimizer](trained, 0.05)
        if kind in ALLOCATORS:
            allocator = ALLOCATORS[kind](self.model, CONFIGS[kind])
            allocator.attach(stepper)
        self.model.train()
        for _ in range(steps):
            stepper.zero_grad()
            (self.model(TOKENS) - torch.randn(3, 3, dtype=torch.float64)).square().mean().backward()
            stepper.step()
        if kind in ALLOCATORS:
            allocator.detach()
        self.model.eval().zero_grad()
        self.adapters[self.active] = weights_of(self.model, self.active)

    # Copies and files

    @rule(way=st.sampled_from(["deepcopy", "pickle"]))
    def copy(self, way):
        original = self.model
        if way == "deepcopy":
            self.model = copy.deepcopy(original)
        else:
            self.model = pickle.loads(pickle.dumps(original))
        with torch.no_grad():
            for tensor in (*original.parameters(), *original.buffers()):
                tensor.zero_()

    @rule()
    def restore(self):
        """The state in a model of the same adapters, whose own values are others."""
        state = copy.deepcopy(self.model.state_dict())
        if self.merged:
            plain = Net()
            plain.load_state_dict(state)
            assert_model(plain, self.expected())
            return
        self.copy("deepcopy")
        self.model.load_state_dict(state)

    @precondition(lambda self: self.active is not None)
    @rule(name=NAMES)
    def save_and_load(self, name):
        """Into a new model, where it is the only one."""
        rw.save_adapter(self.model, self.folder / "saved")
        plain = Net()
        plain.load_state_dict(self.base)
        rw.load_adapter(plain, self.folder / "saved", name=name)
        self.model, self.merged = plain.eval(), False
        self.adapters = {name: self.adapters[self.active]}
        self.kinds = {name: self.kinds[self.active]}
        if self.kinds[name] == "spectral":
            self.kinds[name] = "lora"  # its folder is a plain LoRA
        self.active = name

    @precondition(lambda self: self.active is not None)
    @rule(name=NAMES)
    def export_and_load_beside(self, name):
        rw.export_lora(self.model, self.folder / "exported")
        if self.merged:
            with pytest.raises(RuntimeError, match="unmerge"):
                rw.load_adapter(self.model, self.folder / "exported", name=name)
        elif name not in self.adapters:
            rw.load_adapter(self.model, self.folder / "exported", name=name)
            self.adapters[name] = self.adapters[self.active]
            self.kinds[name], self.active = "lora", name

    @rule(name=st.none() | NAMES)
    def disabled_for_a_while(self, name):
        with rw.disable_adapters(self.model):
            assert_model(self.model, self.base)
            if not self.merged and (name is None or name in self.adapters):
                rw.activate_adapter(self.model, name)
                self.active = name
                assert_model(self.model, self.base)

    # What always holds

    def expected(self):
        return self.base | (self.adapters[self.active] if self.active is not None else {})

    @invariant()
    def it_computes_what_it_should(self):
        assert_model(self.model, self.expected())

    @invariant()
    def adapters_are_as_they_were(self):
        state = ModelAdapters.of(self.model) if self.adapters else None
        assert sorted(state.names if state else []) == sorted(self.adapters)
        if state is None:
            return
        assert state.active == self.active
        assert {x.merged for x in state.layers.values() if x.adapter} <= {self.merged}
        for name, weights in self.adapters.items():
            found = self.base | weights_of(self.model, name)  # files leave rank 0 out
            for key, weight in (self.base | weights).items():
                torch.testing.assert_close(found[key], weight, rtol=0, atol=1e-11)

    @invariant()
    def the_base_keeps_its_bits(self):
        for path, layer in ModelAdapters.of(self.model).layers.items():
            assert torch.equal(layer._base_weight(), self.base[f"{path}.weight"])

    @invariant()
    def the_active_one_alone_is_trained(self):
        trained = {n for n, p in self.model.named_parameters() if p.requires_grad}
        assert all(".lora_" in name or name.startswith("head") for name in trained)
        assert bool(trained) == (self.active is not None)
        assert not any(".adapters." in name for name in trained)


def test_any_sequence_of_operations(tmp_path):
    machine = type("Machine", (ModelMachine,), {"folder": tmp_path})
    known = ("export_lora: the folder has modules", "RankAllocator: an earlier schedule")
    run_machine(machine, 20, known)
