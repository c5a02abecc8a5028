# LoRA-GA: factors from the mean gradient, against the paper, PEFT, and what can go wrong.
import copy

import peft
import pytest
import torch
from first_models import CONFIG, loss, plain, rows
from peft.tuners.lora.loraga import preprocess_loraga
from small_models import assert_unchanged, fingerprint, gpt2
from test_model_quantised import batch, nf4
from test_model_quantised import plain as quantisable
from tolerances import assert_same_bits
from torch import nn

import rankwise as rw


def batches(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return list(rows(dtype).split(10))


def mean_gradients(model: nn.Module, data) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model)
    sum(loss(model, x) for x in data).div(len(data)).backward()
    return {name: model.get_submodule(name).weight.grad for name in ("0", "2")}


def applied(**options) -> nn.Module:
    return rw.apply_lora(plain(), CONFIG, first_values=rw.LoRAGA(batches(), loss, **options))


@pytest.mark.parametrize("at_once", [None, 1])
@pytest.mark.parametrize("gamma", [16.0, 4.0])
def test_factors_are_the_papers(at_once, gamma):
    model = applied(at_once=at_once, gamma=gamma)
    for name, gradient in mean_gradients(plain(), batches()).items():
        U, _, Vh = torch.linalg.svd(gradient, full_matrices=False)
        layer, size = model.get_submodule(name), len(gradient) ** 0.25 / gamma**0.5
        cosines = (layer.lora_A * Vh[:4]).sum(1).abs() / size
        assert (cosines - 1).abs().max() < 1e-9
        cosines = (layer.lora_B * U[:, 4:8]).sum(0).abs() / size
        assert (cosines - 1).abs().max() < 1e-9


def test_the_first_step_goes_where_full_training_goes():
    """The paper's point: B G_A + G_B A holds the 2 r largest directions of the gradient."""
    model, x = applied(), rows()
    loss(model, x).backward()
    for name, gradient in mean_gradients(plain(), batches()).items():
        layer = model.get_submodule(name)
        step = layer.lora_B @ layer.lora_A.grad + layer.lora_B.grad @ layer.lora_A
        U, S, Vh = torch.linalg.svd(gradient, full_matrices=False)
        best = U[:, :8] @ torch.diag(S[:8]) @ Vh[:8]
        assert torch.nn.functional.cosine_similarity(step.flatten(), best.flatten(), dim=0) > 0.999


def test_factors_and_base_are_pefts_with_its_scale():
    data = batches(torch.float32)
    options = dict(r=4, lora_alpha=8, target_modules=["0", "2"], init_lora_weights="lora_ga")
    config = peft.LoraConfig(**options, lora_ga_config=peft.LoraGAConfig())
    theirs = plain(torch.float32).eval()
    preprocess_loraga(theirs, config, lambda: [loss(theirs, x).backward() for x in data])
    theirs = peft.get_peft_model(theirs, config)
    first = rw.LoRAGA(data, loss, scale="peft")
    ours = rw.apply_lora(plain(torch.float32), CONFIG, first_values=first)
    for name in ("0", "2"):
        own, layer = ours.get_submodule(name), theirs.base_model.model.get_submodule(name)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        signs = (own.lora_A * A).sum(1).sign(), (own.lora_B * B).sum(0).sign()
        assert (own.lora_A - signs[0][:, None] * A).abs().max() < 1e-4
        assert (own.lora_B - signs[1] * B).abs().max() < 1e-4 * B.abs().max()
    x = data[0]
    assert (ours(x) - theirs(x)).abs().max() < 1e-5


def test_conv1d():
    model = gpt2().double().eval()
    data = [{"input_ids": torch.arange(14).view(2, 7), "labels": torch.arange(14).view(2, 7)}]
    before = model(**data[0]).logits
    first = rw.LoRAGA(data, lambda model, batch: model(**batch).loss, at_once=2)
    config = rw.LoRAConfig(rank=2, target_modules=["c_attn", "c_fc"])
    rw.apply_lora(model, config, first_values=first)
    assert (model(**data[0]).logits - before).abs().max() < 1e-12
    layer = model.transformer.h[0].attn.c_attn
    assert layer.lora_A.shape == (2, 16) and layer.lora_B.shape == (48, 2)
    assert ((layer.lora_B * layer.lora_B).sum(0).sqrt() - 48**0.25 / 4).abs().max() < 1e-9


def test_the_svd_does_not_depend_on_what_was_drawn_before():
    first = applied()
    torch.manual_seed(3)
    assert torch.equal(first[0].lora_A, applied()[0].lora_A)


@pytest.mark.parametrize("frozen", [False, True])
def test_flags_and_gradients_are_as_before(frozen):
    model, x = plain().requires_grad_(not frozen), rows()
    if not frozen:
        loss(model, x).backward()
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    weights = [p.detach().clone() for p in model.parameters()]
    flags = [p.requires_grad for p in model.parameters()]
    parameters = list(model.parameters())

    def watched(model, batch):
        assert not model.training
        return loss(model, batch)

    rw.apply_lora(model, CONFIG, first_values=rw.LoRAGA(batches(), watched))
    assert model.training and flags == [not frozen] * 4
    for parameter, grad, value in zip(parameters, grads, weights, strict=True):
        assert_same_bits(parameter, value, "weight")
        assert (parameter.grad is None) == (grad is None)
        assert grad is None or torch.equal(parameter.grad, grad)


def test_under_no_grad():
    with torch.no_grad():
        model = applied()
    assert torch.equal(model[0].lora_A, applied()[0].lora_A)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(20, 10), nn.Linear(20, 10)

    def forward(self, x):
        return self.used(x)


def fails(model, batch):
    raise RuntimeError("the user's loss")


BOTH = rw.LoRAConfig(rank=2, target_modules=["used", "unused"])
REFUSED = {
    "no batches": (plain, CONFIG, [], loss, "batches must have at least one batch"),
    "high rank": (
        plain,
        rw.LoRAConfig(rank=9, target_modules=["0", "2"]),
        batches(),
        loss,
        "'2' must have twice the rank's directions, got rank 9 and a side of 16; .* at most 8",
    ),
    "unused": (
        lambda: Two().double(),
        BOTH,
        batches(),
        loss,
        "'unused' must get a finite gradient from every batch, got none",
    ),
    "nan": (plain, CONFIG, [rows() * torch.nan], loss, "'0' must get a finite .* infinite values"),
    "no scalar": (plain, CONFIG, batches(), lambda m, x: m(x), r"loss must .* got \[10, 16\]"),
    "a number": (plain, CONFIG, batches(), lambda m, x: 1.0, "loss must return .* got float"),
    "fails": (plain, CONFIG, batches(), fails, "the user's loss"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name_before_anything_is_changed(case):
    build, config, data, function, message = REFUSED[case]
    model = build()
    before = fingerprint(model)
    with pytest.raises((ValueError, RuntimeError), match=message):
        rw.apply_lora(model, config, first_values=rw.LoRAGA(data, function))
    assert_unchanged(model, before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_quantised_base_is_refused():
    model = nf4(quantisable())
    config = rw.LoRAConfig(rank=2, target_modules=["0", "2"])
    with pytest.raises(ValueError, match="LoRAGA: '0' is quantised.*dequantize"):
        rw.apply_lora(model, config, first_values=rw.LoRAGA([batch()], loss))
