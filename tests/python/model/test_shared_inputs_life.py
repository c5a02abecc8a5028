# Layers that share their input: what holds their outputs, and what becomes of them.
from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from shared_attention import Attention, count, shared
from small_models import randomise
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import rankwise as rw


def test_a_first_layer_that_is_called_again():
    attention, alone, x = shared()
    y = attention.q(x)
    torch.testing.assert_close([attention.q(x), attention.k(x), attention.v(x)], alone(x))
    assert torch.equal(y, attention.q(x))


def test_outputs_are_held_no_longer_than_the_layers_are_called():
    attention, _, x = shared()
    y = x.clone().requires_grad_()
    outputs = attention(y)
    sum(map(torch.sum, outputs)).backward()
    dead = weakref.ref(y)
    del y, outputs
    gc.collect()
    assert dead() is None


def test_layers_never_called_are_apart_after_two_misses():
    attention, alone, x = shared()
    for _ in range(3):
        torch.testing.assert_close(attention.q(x), alone.q(x))
    assert attention.q.shared_input.apart
    assert count(lambda: attention(x)) == 0


def test_copies_pickles_and_files_are_those_of_the_layers(tmp_path):
    attention, alone, x = shared()
    attention.q(x)  # the others wait
    for other in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert count(lambda other=other: other(x)) == 1
        torch.testing.assert_close(other(x), alone(x))
        assert other.q.shared_input is other.v.shared_input is not attention.q.shared_input
    assert attention.state_dict().keys() == alone.state_dict().keys()
    rw.save_adapter(attention, tmp_path / "a")
    rw.save_adapter(alone, tmp_path / "b")
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "b" / "adapter_model.safetensors"
    ).read_bytes()
    plain = rw.unload(attention)
    assert type(plain.q) is nn.Linear and not hasattr(plain.q, "shared_input")


def test_a_layer_put_in_the_place_of_another():
    attention, alone, x = shared()
    attention.k = alone.k = nn.Linear(6, 4)
    for _ in range(3):
        torch.testing.assert_close(attention(x), alone(x))
    assert attention.q.shared_input.apart
    assert [one.names for one in rw.share_inputs(attention)] == [("q", "v")]
    torch.testing.assert_close(attention(x), alone(x))


def test_two_threads_have_their_own_outputs():
    attention, alone, _ = shared()
    failures = []

    def run(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(200):
            x = torch.randn(3, 6, generator=generator)
            try:
                torch.testing.assert_close(attention(x), alone(x))
            except AssertionError as error:
                failures.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_names_that_do_not_tell_share_nothing():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    rw.apply_lora(model, rw.LoRAConfig(rank=2, target_modules=["0", "1"]))
    assert rw.share_inputs(model) == []
    with pytest.raises(ValueError, match="the model has no adapters"):
        rw.share_inputs(nn.Linear(2, 2))


def test_quantised_layers_are_not_shared():
    model = nn.ModuleDict({name: nn.Linear(32, 32) for name in ("q", "k", "v")})
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda layer, name: name == "q")
    rw.apply_lora(model, rw.LoRAConfig(rank=2, target_modules=["q", "k", "v"]))
    assert [one.names for one in rw.share_inputs(model)] == [("k", "v")]


def test_own_names_and_the_end_of_sharing():
    attention, alone, x = shared()
    assert [one.names for one in rw.share_inputs(attention, [("k", "v")])] == [("k", "v")]
    y = torch.randn(2, 6)
    torch.testing.assert_close(attention(x, y), alone(x, y))
    assert count(lambda: attention(x, y)) == 1
    assert rw.share_inputs(attention, []) == [] and count(lambda: attention(x)) == 0


def test_layers_of_other_sizes_do_not_go_together():
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q, self.to_k, self.to_v = (nn.Linear(n, 6) for n in (8, 5, 5))

    model = rw.apply_lora(Cross(), rw.LoRAConfig(rank=2, target_modules="all-linear"))
    assert [one.names for one in rw.share_inputs(model)] == [("to_k", "to_v")]


def test_first_values_are_in_the_outputs():
    model = Attention.__new__(Attention)
    nn.Module.__init__(model)
    model.q, model.k, model.v = (nn.Linear(6, n) for n in (6, 4, 5))
    config = rw.LoRAConfig(rank=2, target_modules=["q", "k", "v"])
    randomise(rw.apply_lora(model, config, first_values=rw.PiSSA()))
    attention, alone, x = shared(model)
    assert count(lambda: attention(x)) == 1
    torch.testing.assert_close(attention(x), alone(x))
