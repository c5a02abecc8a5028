# Adapters over linear layers that bitsandbytes or torchao quantised: QLoRA.
import copy
import io
import pickle

import peft
import pytest
import torch
from quantised_models import (
    LAYERS,
    LORA,
    QUANTISED,
    adapted,
    batch,
    fp4,
    int8,
    int8_of_torchao,
    nf4,
    plain,
)

import rankwise as rw

every = pytest.mark.parametrize("quantise", QUANTISED)


def train(model, steps: int = 20, allocator=None) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
    if allocator is not None:
        allocator.attach(optimizer)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = (model(batch(step % 3)) - batch(9)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@every
def test_a_new_adapter_changes_no_bit(quantise):
    base = quantise(plain())
    wanted = base(batch()).clone()
    model = rw.apply_lora(base, LORA)
    assert torch.equal(model(batch()), wanted)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@every
def test_output_and_gradients_are_the_formulas(quantise):
    model = adapted(quantise)
    layer, base = model[0], quantise(plain())[0]
    x, other = batch().requires_grad_(), batch().requires_grad_()
    A, B = (factor.detach().clone().requires_grad_() for factor in (layer.lora_A, layer.lora_B))
    wanted = base(other) + layer.scaling * (other @ A.T) @ B.T
    y = layer(x)
    torch.testing.assert_close(y, wanted)
    got = torch.autograd.grad(y, [x, layer.lora_A, layer.lora_B], batch(5))
    for gradient, want in zip(
        got, torch.autograd.grad(wanted, [other, A, B], batch(5)), strict=True
    ):
        torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-5)


@every
def test_it_trains_saves_and_loads(quantise, tmp_path):
    model = adapted(quantise)
    losses = train(model)
    assert losses[-1] < 0.9 * losses[0]
    with rw.disable_adapters(model):
        assert torch.equal(model(batch()), quantise(plain())(batch()))
    rw.save_adapter(model, tmp_path)
    again = quantise(plain())
    rw.load_adapter(again, tmp_path)
    assert torch.equal(again(batch()), model(batch()))
    unquantised = plain()
    rw.load_adapter(unquantised, tmp_path)
    torch.testing.assert_close(unquantised(batch()), model(batch()), rtol=0, atol=0.5)


@pytest.mark.parametrize("quantise", [nf4, int8])
def test_stock_peft_computes_the_same(quantise, tmp_path):
    model = adapted(quantise)
    rw.save_adapter(model, tmp_path)
    stock = peft.PeftModel.from_pretrained(quantise(plain()), tmp_path).train()
    torch.testing.assert_close(stock(batch()), model(batch()), rtol=1e-5, atol=1e-5)


@every
def test_merging_is_refused_by_name(quantise):
    model = adapted(quantise)
    wanted = model(batch())
    with pytest.raises(RuntimeError, match="^0: merge: the layer's weight is quantised"):
        rw.merge(model)
    with pytest.raises(RuntimeError, match="^merge: the layer's weight is quantised"):
        model[2].merge()
    assert torch.equal(model(batch()), wanted)


@every
def test_the_quantised_layers_come_back(quantise):
    model, base = adapted(quantise), quantise(plain())
    classes = [type(layer) for layer in base]
    with rw.disable_adapters(model):
        assert torch.equal(model(batch()), base(batch()))
    assert not torch.equal(model(batch()), base(batch()))
    rw.unload(model)
    assert [type(layer) for layer in model] == classes
    assert torch.equal(model(batch()), base(batch()))
    if hasattr(base[0].weight, "module"):
        assert model[0].weight.module is model[0]


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [(copy.deepcopy, quantise) for quantise in QUANTISED]
# torchao's own weights cannot be pickled
COPIES += [
    (copied, quantise)
    for copied in (lambda model: pickle.loads(pickle.dumps(model)), through_torch)
    for quantise in (nf4, fp4, int8)
]


@pytest.mark.parametrize("copied, quantise", COPIES)
def test_copies(copied, quantise):
    model = adapted(quantise)
    other = copied(model)
    assert torch.equal(other(batch()), model(batch()))
    train(other, 2)
    assert not torch.equal(other(batch()), model(batch()))


@every
def test_adalora_prunes_and_shrinks(quantise):
    config = rw.AdaLoRAConfig(
        initial_rank=4, target_rank=2, total_steps=12, warmup_steps=2, final_steps=4,
        target_modules=LAYERS,
    )  # fmt: skip
    model = rw.apply_lora(quantise(plain()), config)
    allocator = rw.RankAllocator(model, config)
    losses = train(model, 12, allocator)
    assert min(losses) < losses[0] and allocator.frozen
    assert sum(layer.rank for layer in (model[0], model[2])) == 4


@every
def test_several_adapters_and_reports(quantise):
    model = adapted(quantise)
    first = model(batch())
    rw.add_adapter(model, "second", LORA)
    rw.activate_adapter(model, "second")
    assert torch.equal(model(batch()), quantise(plain())(batch()))
    rw.activate_adapter(model, "default")
    assert torch.equal(model(batch()), first)
    model(batch()).sum().backward()
    assert rw.health_check(model).ok
    assert "0" in str(rw.summary(model))


@pytest.mark.parametrize("quantise", [nf4, int8_of_torchao])
@pytest.mark.parametrize("factors", [None, torch.bfloat16])
def test_sixteen_bit_inputs(quantise, factors):
    config = rw.LoRAConfig(rank=4, target_modules=LAYERS, adapter_dtype=factors)
    model = adapted(quantise, config, torch.bfloat16)
    assert model[0].lora_A.dtype == (factors or torch.float32)
    y = model(batch(dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert rw.health_check(model).ok


@every
def test_autocast(quantise):
    model = adapted(quantise)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(batch())
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and model[0].lora_A.grad.dtype == torch.float32


def test_a_dtype_that_factors_cannot_have():
    message = "adapter_dtype must be torch.float32, .* over a quantised base, got torch.float64"
    with pytest.raises(ValueError, match=f"0: adapter: {message}"):
        adapted(nf4, rw.LoRAConfig(rank=4, target_modules=LAYERS, adapter_dtype=torch.float64))


def test_all_linear_takes_them(recwarn):
    model = rw.apply_lora(nf4(plain()), rw.LoRAConfig(rank=2, target_modules="all-linear"))
    assert all(isinstance(model[i], rw.adapted.Adapted) for i in (0, 2))
    assert not recwarn
