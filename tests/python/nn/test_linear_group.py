# LoRALinearGroup: what its layers give when they are called one by one.
from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from group_calls import GroupCalls
from layer_cases import IN, make, randomise
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rankwise as rw


class Attention(nn.Module):
    """q, k and v of different kinds, ranks and sizes, with a group over them."""

    def __init__(self, dtype: torch.dtype = torch.float32, **options) -> None:
        super().__init__()
        self.q = make("linear", dtype, **options)
        self.k = make("adalora", dtype, rank=2, alpha=3.0, **options)
        self.v = randomise(rw.nn.LoRALinear(IN, 4, bias=False, dtype=dtype, rank=3, **options))
        self.group = rw.nn.LoRALinearGroup([self.q, self.k, self.v])

    def alone(self, x: Tensor) -> list[Tensor]:
        return [self.q(x), self.k(x), self.v(x)]


def example(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, IN, generator=torch.Generator().manual_seed(1)).to(dtype)


def gradients(outputs: list[Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(sum(torch.sin(y).sum() for y in outputs), inputs)


def grouped(attention: Attention, x: Tensor) -> tuple[list[Tensor], int]:
    with GroupCalls() as counted:
        return attention.group(x), counted.count


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_outputs_and_gradients_are_the_layers(dtype):
    attention, x = Attention(dtype), example(dtype).requires_grad_()
    outputs, count = grouped(attention, x)
    assert count == 1
    wanted = attention.alone(x)
    torch.testing.assert_close(outputs, wanted)
    inputs = [x, *(p for p in attention.parameters() if p.requires_grad)]
    assert len(inputs) == 8
    torch.testing.assert_close(gradients(outputs, inputs), gradients(wanted, inputs))


def test_outputs_may_be_changed_in_place():
    attention, x = Attention(torch.float64), example(torch.float64)
    outputs = attention.group(x)
    outputs[0].mul_(3)
    wanted = attention.alone(x)
    wanted[0].mul_(3)
    inputs = [p for p in attention.parameters() if p.requires_grad]
    torch.testing.assert_close(gradients(outputs, inputs), gradients(wanted, inputs))


def test_float32_factors_over_sixteen_bits_and_autocast():
    attention, x = Attention(torch.bfloat16), example(torch.bfloat16)
    outputs, count = grouped(attention, x)
    assert count == 1 and {y.dtype for y in outputs} == {torch.bfloat16}
    torch.testing.assert_close(outputs, attention.alone(x))
    attention = Attention()
    with torch.autocast("cpu", torch.bfloat16):
        outputs, count = grouped(attention, example())
        torch.testing.assert_close(outputs, attention.alone(example()))
    assert count == 1


def test_it_is_no_module_and_changes_no_names():
    attention = Attention()
    assert not isinstance(attention.group, nn.Module)
    assert {name.split(".")[0] for name in attention.state_dict()} == {"q", "k", "v"}


def test_dropout_has_one_mask_for_all_layers():
    layer = make("linear", dropout=0.5)
    group = rw.nn.LoRALinearGroup([layer, copy.deepcopy(layer)])
    x = example()
    first, second = group(x)
    assert torch.equal(first, second) and not torch.equal(first, layer.eval()(x))
    group.layers[1].eval()
    for y in group(x):
        torch.testing.assert_close(y, layer(x))


def hooked(attention: Attention) -> None:
    attention.k.register_forward_hook(lambda layer, args, y: y + 1)


def hooked_before(attention: Attention) -> None:
    attention.v.register_forward_pre_hook(lambda layer, args: (2 * args[0],))


def replaced(attention: Attention) -> None:
    attention.q.forward = lambda x: x


class Doubled(rw.nn.LoRALinear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def of_a_subclass(attention: Attention) -> None:
    attention.q.__class__ = Doubled


def merged(attention: Attention) -> None:
    attention.eval()
    attention.q.merge()


def disabled(attention: Attention) -> None:
    attention.k.adapters_enabled = False


def without_adapter(attention: Attention) -> None:
    attention.v.activate_adapter(None)


def of_other_dtype(attention: Attention) -> None:
    attention.to(torch.bfloat16)
    attention.q = make("linear", torch.bfloat16, adapter_dtype=torch.float32)
    attention.group = rw.nn.LoRALinearGroup([attention.q, attention.k, attention.v])


ALONE = [
    hooked, hooked_before, replaced, of_a_subclass, merged, disabled, without_adapter,
    of_other_dtype,
]  # fmt: skip


@pytest.mark.parametrize("change", ALONE)
def test_layers_that_compute_anything_else_are_called_one_by_one(change):
    attention = Attention()
    change(attention)
    x = example(attention.q.weight.dtype)
    outputs, count = grouped(attention, x)
    assert count == 0
    torch.testing.assert_close(outputs, attention.alone(x), rtol=0, atol=0)


def test_parametrised_weights():
    attention, x = Attention(), example()
    nn.utils.parametrize.register_parametrization(attention.q, "weight", nn.Softplus())
    torch.testing.assert_close(attention.group(x), attention.alone(x))


def test_hooks_of_all_modules_run():
    attention, seen = Attention(), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        attention.group(example())
    finally:
        handle.remove()
    assert seen == [attention.q, attention.k, attention.v]


def test_layers_of_other_dropouts_have_their_own_masks():
    attention = Attention(dropout=0.5)
    attention.q.eval()
    torch.manual_seed(4)
    outputs, count = grouped(attention, example())
    assert count == 0
    torch.manual_seed(4)
    torch.testing.assert_close(outputs, attention.alone(example()), rtol=0, atol=0)


def test_nested_inputs():
    attention = Attention()
    x = torch.nested.nested_tensor([example()[0], example()[1, :2]], layout=torch.jagged)
    outputs, count = grouped(attention, x)
    assert count == 0
    torch.testing.assert_close([y.values() for y in outputs], attention.alone(x.values()))


def test_sparse_inputs():
    attention, x = Attention(), example()[0].relu()
    outputs, count = grouped(attention, x.to_sparse())
    assert count == 0
    torch.testing.assert_close(outputs, attention.alone(x))


def test_what_became_of_the_layers_counts():
    attention, x = Attention(), example()
    with torch.no_grad():
        attention.group(x)
        attention.v.lora_B.add_(1)
        x.mul_(2)
        attention.q.add_adapter("other", attention.q.options)
        attention.q.activate_adapter("other")
        randomise(attention.q, seed=9)
        outputs, count = grouped(attention, x)
        assert count == 1
        torch.testing.assert_close(outputs, attention.alone(x))
        attention.v.delete_adapter("default")
        torch.testing.assert_close(attention.group(x), attention.alone(x))


def test_nothing_is_kept_between_calls():
    attention = Attention()
    before = {k: v for k, v in vars(attention.group).items()}
    outputs = attention.group(example())
    assert vars(attention.group) == before and all(y.grad_fn is not None for y in outputs)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_a_group_of_its_own_layers(copied):
    attention = Attention()
    other = copied(attention)
    assert other.group.layers == (other.q, other.k, other.v)
    torch.testing.assert_close(other.group(example()), attention.group(example()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    attention, x = Attention(dropout=0.5), example().requires_grad_()
    inputs = [p for p in attention.parameters() if p.requires_grad]

    def loss(x: Tensor) -> Tensor:
        return sum(torch.sin(y).sum() for y in attention.group(x))

    torch.manual_seed(6)
    loss(x).backward()
    wanted = [p.grad.clone() for p in (x, *inputs)]
    for p in (x, *inputs):
        p.grad = None
    torch.manual_seed(6)
    checkpoint(loss, x, use_reentrant=reentrant).backward()
    torch.testing.assert_close([p.grad for p in (x, *inputs)], wanted)


def test_compiled_without_a_graph_break():
    attention, x = Attention(), example()
    compiled = torch.compile(lambda x: attention.group(x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), attention.group(x))


def test_two_threads():
    attention, found = Attention(), {}
    inputs = [example(), 2 * example()]
    wanted = [attention.group(x) for x in inputs]

    def work(i: int) -> None:
        found[i] = [attention.group(inputs[i]) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        for outputs in found[i]:
            torch.testing.assert_close(outputs, wanted[i], rtol=0, atol=0)


def test_refusals():
    with pytest.raises(TypeError, match="layers must be adapted linear layers, got Linear"):
        rw.nn.LoRALinearGroup([make("linear"), nn.Linear(IN, 2)])
    with pytest.raises(TypeError, match="got LoRAEmbedding"):
        rw.nn.LoRALinearGroup([make("embedding")])
    with pytest.raises(ValueError, match=r"one in_features, got in_features \[6, 3\]"):
        rw.nn.LoRALinearGroup([make("linear"), rw.nn.LoRALinear(3, 2)])
    with pytest.raises(ValueError, match=r"at least one, .* got in_features \[\]"):
        rw.nn.LoRALinearGroup([])
