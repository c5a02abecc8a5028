# Evidence for ranks before a training: gradients and inputs of batches, against autograd, EVA.
import copy

import pytest
import torch
from first_models import CONFIG, loss, plain, rows
from small_models import assert_unchanged, fingerprint, gpt2
from test_model_quantised import nf4
from test_model_quantised import plain as quantisable
from torch import nn

import rankwise as rw

BATCHES = list(rows().split(10))


def squares(model, data, names):
    """{layer: mean over batches and elements}, from .grad."""
    found = dict.fromkeys(names, 0.0)
    for batch in data:
        own = copy.deepcopy(model).eval()
        loss(own, batch).backward()
        for name in names:
            found[name] += own.get_submodule(name).weight.grad.square().mean().item() / len(data)
    return found


@pytest.mark.parametrize("at_once", [None, 1])
def test_squared_gradients(at_once):
    model = plain()
    model[0].weight.requires_grad_(False)
    before = fingerprint(model)
    found = rw.analysis.squared_gradients(model, CONFIG, iter(BATCHES), loss, at_once)
    assert found.scores == pytest.approx(squares(plain(), BATCHES, ["0", "2"]), rel=1e-9)
    assert found.sizes == {"0": (24, 20), "2": (16, 24)}
    assert_unchanged(model, before)
    assert all(p.grad is None for p in model.parameters())


def test_squared_gradients_of_conv1d_and_embeddings():
    model = gpt2().eval()
    names = ["transformer.wte", "transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"]
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    config = rw.LoRAConfig(target_modules=names)
    data = [{"input_ids": torch.arange(14).view(2, 7), "labels": torch.arange(14).view(2, 7)}]

    def own(model, batch):
        return model(**batch).loss

    found = rw.analysis.squared_gradients(model, config, data, own)
    assert found.sizes == {names[0]: (16, 40), names[1]: (48, 16), names[2]: (16, 64)}
    own(model, data[0]).backward()
    for name in names:
        wanted = model.get_submodule(name).weight.grad.square().mean().item()
        assert found.scores[name] == pytest.approx(wanted, rel=1e-5)


def test_adapters_that_are_there_do_not_count():
    model = rw.apply_lora(plain(), CONFIG)
    nn.init.normal_(model[0].lora_B)
    found = rw.analysis.squared_gradients(model, CONFIG, BATCHES, loss)
    assert found == rw.analysis.squared_gradients(plain(), CONFIG, BATCHES, loss)
    found = rw.analysis.input_variances(model, CONFIG, BATCHES, most=4)
    assert found == rw.analysis.input_variances(plain(), CONFIG, BATCHES, most=4)
    assert model[0].adapters_enabled


def test_input_variances_are_pcas():
    model, x = plain(), rows()
    before = fingerprint(model)
    found = rw.analysis.input_variances(model, CONFIG, BATCHES, most=5, at_once=1)
    assert found.sizes == {"0": (24, 20), "2": (16, 24)}
    for name, inputs in {"0": x, "2": model[:2](x).detach()}.items():
        values = torch.linalg.svdvals(inputs - inputs.mean(0)).square()
        assert found.scores[name] == pytest.approx((values / values.sum())[:5].tolist())
    assert_unchanged(model, before)


def test_input_variances_give_evas_ranks_where_layers_cost_the_same():
    torch.manual_seed(1)
    model = nn.Sequential(*(nn.Linear(12, 12) for _ in range(3)))
    with torch.no_grad():
        model[1].weight[1:] /= 8
    config, x = rw.LoRAConfig(rank=2, target_modules=["0", "1", "2"]), torch.randn(40, 12)
    found = rw.analysis.input_variances(model, config, [x], most=6)
    advice = rw.analysis.rank_advice(found, mean_rank=2, min_rank=0)
    eva = rw.apply_lora(model, config, first_values=rw.EVA([x], rho=3.0))
    given = {layer.name: layer.rank for layer in rw.summary(eva).layers}
    assert {name: rank for name, rank in advice.ranks.items() if rank} == given
    assert len(set(given.values())) > 1


def refused(kind):
    def call(model, config=CONFIG, data=BATCHES, **options):
        if kind == "input_variances":
            return rw.analysis.input_variances(model, config, data, **options)
        return rw.analysis.squared_gradients(
            model, config, data, options.pop("of", loss), **options
        )

    return call


GRADIENTS, INPUTS = refused("squared_gradients"), refused("input_variances")
EMBEDDING = rw.LoRAConfig(target_modules=["transformer.wpe"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GRADIENTS(plain(), data=[]), "squared_gradients: batches must have at least one"),
        (lambda: GRADIENTS(plain(), of=lambda m, x: m(x)), "squared_gradients: loss must return a"),
        (lambda: GRADIENTS(plain(), at_once=0), "squared_gradients: at_once must be an integer"),
        (
            lambda: GRADIENTS(plain(), of=lambda m, x: m[0](x).sum()),
            "squared_gradients: '2' must get a finite gradient from every batch, got none",
        ),
        (
            lambda: GRADIENTS(nf4(quantisable()), rw.LoRAConfig(target_modules=["0"])),
            "squared_gradients: '0' is quantised.*or use EVA or input_variances",
        ),
        (lambda: INPUTS(plain(), data=[]), "input_variances: batches must have at least one batch"),
        (lambda: INPUTS(plain(), most=0), "input_variances: most must be an integer > 0, got 0"),
        (
            lambda: INPUTS(plain(), data=[rows()[:3]]),
            "input_variances: '0' must see at least as many inputs as .* directions, 20, got 3",
        ),
        (lambda: INPUTS(gpt2(), EMBEDDING), "input_variances: 'transformer.wpe' must be a linear"),
    ],
)  # fmt: skip
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
