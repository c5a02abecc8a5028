# share_inputs: what the layers compute, in one call where a model asks for them one by one.
from __future__ import annotations

import pytest
import torch
from shared_attention import Attention, count, shared
from small_models import bert, inputs, llama, loss, output, randomise, t5
from torch import Tensor, nn

import rankwise as rw


def adapted(build, **options) -> nn.Module:
    config = rw.LoRAConfig(rank=2, target_modules="all-linear", **options)
    return randomise(rw.apply_lora(build(), config)).train()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    loss(model).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "build, groups", [(bert, [3, 3]), (llama, [3, 2, 3, 2])], ids=["bert", "llama"]
)
def test_outputs_and_gradients_are_those_without(build, groups):
    model = adapted(build).double()
    before, wanted = output(model), gradients(model)
    found = rw.share_inputs(model)
    assert [len(one.names) for one in found] == groups
    assert count(lambda: output(model)) == len(groups)
    torch.testing.assert_close(output(model), before)
    torch.testing.assert_close(gradients(model), wanted)
    assert not any(one.apart for one in found)
    assert count(lambda: gradients(model)) == len(groups)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    model = adapted(llama).double()
    model.enable_input_require_grads()
    wanted = gradients(model)
    found = rw.share_inputs(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for _ in range(3):
        torch.testing.assert_close(gradients(model), wanted)
    assert not any(one.apart for one in found)
    assert count(lambda: gradients(model)) == 2 * len(found)  # and again in the backward pass


def test_a_cross_attention_is_called_one_by_one():
    model = adapted(t5).double()
    wanted = gradients(model)
    found = rw.share_inputs(model)
    for _ in range(3):
        torch.testing.assert_close(gradients(model), wanted)
    apart = [one.names[0] for one in found if one.apart]
    assert apart == [f"decoder.block.{i}.layer.1.EncDecAttention.q" for i in range(2)]
    assert len(found) == 6 and count(lambda: output(model)) == 4
    assert repr(found[-1]).endswith("EncDecAttention.v, apart)")


def test_generation_with_a_cache():
    model = adapted(llama).double().eval()
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    wanted = model.generate(**inputs(model), **options)
    found = rw.share_inputs(model)
    assert torch.equal(model.generate(**inputs(model), **options), wanted)
    with torch.no_grad():
        assert count(lambda: output(model)) == len(found)


def changed_input(attention: Attention, x: Tensor) -> None:
    x.mul_(2)


def changed_parameter(attention: Attention, x: Tensor) -> None:
    with torch.no_grad():
        attention.k.lora_B.mul_(3)
        attention.v.lora_B.mul_(3)


def other_adapter(attention: Attention, x: Tensor) -> None:
    for layer in (attention.k, attention.v):
        layer.activate_adapter("other")


def other_rank(attention: Attention, x: Tensor) -> None:
    attention.k.rank = attention.v.rank = 1


def merged(attention: Attention, x: Tensor) -> None:
    for layer in (attention.k, attention.v):
        layer.merge()


def disabled(attention: Attention, x: Tensor) -> None:
    attention.k.adapters_enabled = attention.v.adapters_enabled = False


def hooked(attention: Attention, x: Tensor) -> None:
    for layer in (attention.k, attention.v):
        layer.register_forward_pre_hook(lambda layer, args: (args[0] + 1,))
        layer.register_forward_hook(lambda layer, args, y: 3 * y)


def moved(attention: Attention, x: Tensor) -> None:
    attention.k.double().float()
    attention.v.weight.data = attention.v.weight.data.clone().mul_(2)
    attention.v.weight = nn.Parameter(attention.v.weight.data, requires_grad=False)


BETWEEN = [
    changed_input,
    changed_parameter,
    other_adapter,
    other_rank,
    merged,
    disabled,
    hooked,
    moved,
]


@pytest.mark.parametrize("change", BETWEEN)
def test_nothing_is_taken_that_a_layer_would_compute_otherwise(change):
    attention = Attention()
    for layer in (attention.k, attention.v):
        layer.add_adapter("other", layer.options)
        nn.init.ones_(layer.adapters["other"].lora_B)
    attention, alone, x = shared(attention.eval())
    for one in (attention, alone):
        own = x.clone()
        one.q(own)
        change(one, own)
        one.found = [one.k(own), one.v(own)]
    torch.testing.assert_close(attention.found, alone.found)


def test_each_mode_computes_its_own():
    attention, alone, x = shared()
    with torch.no_grad():
        attention.q(x)
    assert attention.k(x).requires_grad
    attention.q(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention.k(x).dtype == torch.bfloat16
    assert attention.q.shared_input.apart
    rw.share_inputs(attention)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(attention(x), alone(x))
        assert count(lambda: attention(x)) == 1


def test_inference_mode_and_compiled_models_call_them_one_by_one():
    attention, alone, x = shared()
    with torch.inference_mode():
        y = torch.randn(3, 6)
        assert count(lambda: attention(y)) == 0
        torch.testing.assert_close(attention(y), alone(y), rtol=0, atol=0)
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), alone(x))
    assert count(lambda: attention(x)) == 1


def test_dropout_has_one_mask_for_all():
    model = Attention(dropout=0.5)
    model.k.load_state_dict(nn.Linear(6, 4).state_dict())
    attention, alone, x = shared(model)
    attention.eval(), alone.eval()
    torch.testing.assert_close(attention(x), alone(x))
    attention.train()
    assert count(lambda: attention(x)) == 1
    torch.manual_seed(5)
    q = attention(x)[0]
    torch.manual_seed(5)
    assert torch.equal(attention(x)[0], q)
