# PiSSA, OLoRA, LoRA-GA, EVA: nothing changes at the start, and the factors are the papers'.
import copy

import peft
import pytest
import torch
from first_models import CONFIG, EVERY, INSIDE, begun, loss, plain, rows, trained
from small_models import assert_unchanged, bert, fingerprint, gpt2, output
from tolerances import assert_same_bits
from torch import nn

import rankwise as rw

TARGETS = {bert: ["query", "dense"], gpt2: ["c_attn", "c_fc"]}


def alike_up_to_sign(A, B, other_A, other_B, tolerance):
    """Row by row of A, each with its column of B."""
    signs = (A * other_A).sum(1).sign()
    assert (A - signs[:, None] * other_A).abs().max() < tolerance
    assert (B - signs * other_B).abs().max() < tolerance


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("training", [True, False])
def test_the_function_is_the_untouched_models(kind, training):
    config = rw.LoRAConfig(rank=4, alpha=8.0, target_modules=["0", "2"], dropout=0.3)
    model, x = begun(kind, config).train(training), rows()
    assert (model(x) - plain()(x)).abs().max() < 1e-12
    assert (trained(model)(x) - plain()(x)).abs().max() > 1e-3


@pytest.mark.parametrize("first", [rw.PiSSA(), rw.OLoRA()], ids=["pissa", "olora"])
@pytest.mark.parametrize("build", TARGETS)
@pytest.mark.parametrize("rslora", [False, True])
def test_the_function_of_transformers_models_too(build, first, rslora):
    model = build().double().eval()
    before = output(model)
    config = rw.LoRAConfig(rank=3, alpha=6.0, rslora=rslora, target_modules=TARGETS[build])
    rw.apply_lora(model, config, first_values=first)
    assert (output(model) - before).abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["pissa", "olora", "lora_ga"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("narrow", [False, True])
def test_in_low_precision_outputs_move_by_their_own_rounding_alone(kind, dtype, narrow):
    """The constant part and the trained one cancel before the one rounding of a layer's output."""
    base, x = plain(dtype)[:1], rows(dtype)
    model = copy.deepcopy(base)
    config = rw.LoRAConfig(
        rank=4, alpha=8.0, target_modules=["0"], adapter_dtype=dtype if narrow else None
    )
    rw.apply_lora(model, config, first_values=EVERY[kind]())
    before, after = base(x).double(), model(x).double()
    assert ((after - before).abs() <= 4 * torch.finfo(dtype).eps * before.abs().clamp(min=1)).all()
    if dtype != torch.float32:
        assert (after == before).double().mean() > 0.95


@pytest.mark.parametrize("kind", INSIDE)
def test_the_base_is_not_written(kind):
    model = plain()
    weights = [model[0].weight, model[2].weight]
    wanted = [weight.detach().clone() for weight in weights]
    trained(rw.apply_lora(model, CONFIG, first_values=EVERY[kind]()))
    assert model[0].weight is weights[0] and model[2].weight is weights[1]
    for weight, value in zip(weights, wanted, strict=True):
        assert_same_bits(weight, value, kind)
        assert weight.grad is None and not weight.requires_grad


def test_pissa_is_the_top_of_the_svd():
    model = begun("pissa")
    for layer in (model[0], model[2]):
        U, S, Vh = torch.linalg.svd(layer.weight, full_matrices=False)
        top = U[:, :4] @ torch.diag(S[:4]) @ Vh[:4]
        assert (layer.scaling * layer.lora_B @ layer.lora_A - top).abs().max() < 1e-12
        assert (layer.lora_A.norm(dim=1) - layer.lora_B.norm(dim=0)).abs().max() < 1e-12


def test_olora_is_the_front_of_the_qr_decomposition():
    model = begun("olora")
    for layer in (model[0], model[2]):
        Q, R = torch.linalg.qr(layer.weight)
        assert torch.equal(layer.lora_B, Q[:, :4]) and torch.equal(layer.lora_A, R[:4])


# PEFT's OLoRA decomposes the weight of gpt2's Conv1D as it is stored, [in, out], and is not here.
@pytest.mark.parametrize(
    "kind, build",
    [("pissa", bert), ("pissa", gpt2), ("pissa_niter_16", bert), ("pissa_niter_16", gpt2)]
    + [("olora", bert)],
)
def test_factors_are_pefts(kind, build, monkeypatch):
    monkeypatch.setattr(peft.tuners.lora.layer, "svd_lowrank", seeded_svd_lowrank)
    options = dict(r=3, lora_alpha=6, target_modules=TARGETS[build], init_lora_weights=kind)
    theirs = peft.get_peft_model(build_seeded(build), peft.LoraConfig(**options))
    first = {"pissa": rw.PiSSA(), "olora": rw.OLoRA()}.get(kind, rw.PiSSA(iterations=16))
    config = rw.LoRAConfig(rank=3, alpha=6.0, target_modules=TARGETS[build])
    ours = rw.apply_lora(build_seeded(build), config, first_values=first)
    layers = {n: m for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert len(layers) > 3
    for name, layer in layers.items():
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        own = ours.get_submodule(name)
        alike_up_to_sign(own.lora_A, own.lora_B, A, B, 2e-5)
        residual = own._matrix(own.weight) - own.scaling * own.lora_B @ own.lora_A
        theirs_now = layer.get_base_layer().weight
        assert (own._matrix(residual) - theirs_now).abs().max() < 2e-6, name


def seeded_svd_lowrank(*args, **options):
    torch.manual_seed(0)
    return torch.svd_lowrank(*args, **options)


def build_seeded(build):
    torch.manual_seed(5)
    return build().eval()


def test_training_is_that_of_an_adapter_over_the_residual_base():
    """Step by step PEFT's PiSSA, whose base has lost what ours subtracts."""
    x = rows(torch.float32)
    options = dict(r=4, lora_alpha=8, target_modules=["0", "2"], init_lora_weights="pissa")
    theirs = peft.get_peft_model(plain(torch.float32), peft.LoraConfig(**options))
    ours = rw.apply_lora(plain(torch.float32), CONFIG, first_values=rw.PiSSA())
    optimizers = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.2)
        for m in (ours, theirs)
    ]
    for _ in range(20):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            loss(model, x).backward()
            optimizer.step()
    assert (ours(x) - plain(torch.float32)(x)).abs().max() > 1e-2
    assert (ours(x) - theirs(x)).abs().max() < 1e-5


def test_the_randomised_svd_does_not_depend_on_what_was_drawn_before():
    first, model = begun("pissa_iterations"), plain()
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    rw.apply_lora(model, CONFIG, first_values=rw.PiSSA(iterations=8))
    after = torch.random.get_rng_state()
    assert torch.equal(first[0].lora_A, model[0].lora_A)
    other = rw.apply_lora(plain(), CONFIG, first_values=rw.PiSSA(iterations=0, seed=1))
    assert not torch.equal(first[0].lora_A, other[0].lora_A)
    torch.random.set_rng_state(state)
    rw.apply_lora(rw.unload(model), CONFIG)
    assert torch.equal(torch.random.get_rng_state(), after), "the SVD's draws are not the user's"


def test_a_layer_smaller_than_the_rank_begins_with_its_smaller_side():
    model = nn.Sequential(nn.Linear(16, 3), nn.Linear(3, 16)).double()
    x = torch.randn(5, 16).double()
    before = model(x)
    config = rw.LoRAConfig(rank=8, alpha=16.0, target_modules=["0", "1"])
    with pytest.warns(UserWarning, match=r"'0' \(3 in the place of 8\)"):
        rw.apply_lora(model, config, first_values=rw.PiSSA())
    assert [layer.rank for layer in model] == [3, 3]
    assert [layer.scaling for layer in model] == [2.0, 2.0]
    assert (model(x) - before).abs().max() < 1e-12


def embedding():
    return nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8))


def spoilt():
    model = plain()
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    return model


ADALORA = rw.AdaLoRAConfig(total_steps=10, target_modules=["0"])
REFUSED = {
    "adalora": (plain, ADALORA, r"PiSSA: '0' has AdaLoRA's first values; use LoRAConfig"),
    "embedding": (
        embedding,
        rw.LoRAConfig(target_modules=["0", "1"]),
        r"PiSSA: '0' must be a linear layer, got an embedding; exclude it",
    ),
    "rank 0": (
        plain,
        rw.LoRAConfig(rank=4, rank_pattern={"2": 0}, target_modules=["0", "2"]),
        r"PiSSA: '2' must begin with a rank and an alpha above 0, got rank 0",
    ),
    "alpha 0": (plain, rw.LoRAConfig(alpha=0.0, target_modules=["0"]), r"got rank 8 and alpha 0"),
    "meta": (
        lambda: plain().to("meta"),
        CONFIG,
        r"PiSSA: '0' must have its weight's values, got meta; load them first",
    ),
    "nan": (spoilt, CONFIG, r"PiSSA: '2' must have a finite weight"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name_before_anything_is_changed(case):
    build, config, message = REFUSED[case]
    model = build()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        rw.apply_lora(model, config, first_values=rw.PiSSA())
    after = fingerprint(model)
    assert before.modules == after.modules and before.parameters == after.parameters
    assert before.trainable == after.trainable and before.attributes == after.attributes


@pytest.mark.parametrize("wrong", ["pissa", rw.PiSSA, 3], ids=["name", "class", "number"])
def test_what_is_no_first_values_is_named(wrong):
    model = plain()
    before = fingerprint(model)
    with pytest.raises(TypeError, match=r"first_values must be rw.PiSSA\(\), .* or None, got"):
        rw.apply_lora(model, CONFIG, first_values=wrong)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: rw.PiSSA(iterations=-1), "PiSSA: iterations must be an integer >= 0 or None"),
        (lambda: rw.PiSSA(seed=0.5), "PiSSA: seed must be an integer, got 0.5"),
        (lambda: rw.EVA([], rho=0.5), "EVA: rho must be at least 1, got 0.5"),
        (lambda: rw.EVA([], at_once=0), "EVA: at_once must be an integer > 0 or None, got 0"),
        (lambda: rw.LoRAGA([], loss, gamma=0), "LoRAGA: gamma must be > 0, got 0"),
        (lambda: rw.LoRAGA([], loss, scale="stable"), r"LoRAGA: scale must be one of"),
        (lambda: rw.LoRAGA([], None), "LoRAGA: loss must be a function of model and batch"),
    ],
)
def test_wrong_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
