# EVA: directions and ranks from the inputs of layers, against PCA, PEFT, and what can go wrong.
import copy

import peft
import pytest
import torch
from small_models import bert, output
from test_model_quantised import QUANTISED, batch
from test_model_quantised import plain as quantisable
from tolerances import assert_same_bits
from torch import nn

import rankwise as rw

CONFIG = rw.LoRAConfig(rank=5, alpha=10.0, target_modules=["0", "2", "4"])


def plain(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(7)
    layers = nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 16)
    with torch.no_grad():
        layers[0].weight[:, 3:] *= 0.1  # the layers behind it see few directions
    return nn.Sequential(*layers).to(dtype)


def rows(count: int = 60, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    mixed = torch.randn(count, 20, generator=generator, dtype=torch.float64)
    return (mixed * torch.linspace(3, 0.1, 20, dtype=torch.float64) + 5).to(dtype)


def inputs_of_layers(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {}
    for name, layer in model.named_children():
        found[name] = x
        x = layer(x)
    return {name: found[name] for name in CONFIG.target_modules}


def principal(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(shares of the variance, directions)"""
    _, S, Vh = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    return S**2 / (S**2).sum(), Vh


def ranks_of(model: nn.Module) -> dict[str, int]:
    return {layer.name: layer.rank for layer in rw.summary(model).layers}


@pytest.mark.parametrize("size", [60, 17, 1])
@pytest.mark.parametrize("at_once", [None, 1, 2])
def test_rows_of_a_are_the_principal_directions_of_all_inputs(size, at_once):
    model, x = plain(), rows()
    found = inputs_of_layers(model, x)
    eva = rw.EVA(list(x.split(size)), at_once=at_once)
    rw.apply_lora(model, CONFIG, first_values=eva)
    for name, rank in ranks_of(model).items():
        A = model.get_submodule(name).lora_A
        _, directions = principal(found[name])
        assert A.shape == (rank, 20)
        assert ((A * directions[:rank]).sum(1).abs() - 1).abs().max() < 1e-10
        assert not model.get_submodule(name).lora_B.any()


def test_inputs_far_from_zero_keep_their_digits():
    x = rows() + 1e7
    config = rw.LoRAConfig(rank=3, target_modules=["0"])
    model = rw.apply_lora(plain(), config, first_values=rw.EVA(list(x.split(20))))
    _, directions = principal(x)
    assert ((model[0].lora_A * directions[:3]).sum(1).abs() - 1).abs().max() < 1e-9


def test_ranks_follow_the_shares_of_the_variance_under_one_total():
    model, x = plain(), rows()
    shares = {n: principal(i)[0][:10] for n, i in inputs_of_layers(model, x).items()}
    least = torch.cat(list(shares.values())).sort(descending=True).values[14]
    wanted = {name: int((own >= least).sum()) for name, own in shares.items()}
    rw.apply_lora(model, CONFIG, first_values=rw.EVA([x]))
    assert ranks_of(model) == wanted and sum(wanted.values()) == 15
    assert len(set(wanted.values())) > 1
    assert {layer.scaling for layer in rw.summary(model).layers} == {2.0}


def test_rho_1_leaves_ranks_as_they_are():
    config = rw.LoRAConfig(rank=5, rank_pattern={"2": 3}, target_modules=["0", "2", "4"])
    model = rw.apply_lora(plain(), config, first_values=rw.EVA([rows()], rho=1))
    assert ranks_of(model) == {"0": 5, "2": 3, "4": 5}


def test_the_output_does_not_change_by_a_bit_and_the_base_is_the_same():
    model, x = plain(), rows()
    before, weight = model(x), model[0].weight
    rw.apply_lora(model, CONFIG, first_values=rw.EVA([x]))
    assert_same_bits(model(x), before, "output")
    assert model[0].weight is weight and model[0].lora_first is None


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_ranks_alphas_and_factors_are_pefts(rho):
    x = rows(dtype=torch.float32)
    options = dict(r=5, lora_alpha=10, target_modules=["0", "2", "4"], init_lora_weights="eva")
    config = peft.LoraConfig(**options, eva_config=peft.EvaConfig(rho=rho, tau=0.9999))
    theirs = peft.get_peft_model(plain(torch.float32), config)
    others = dict(forward_fn=lambda model, batch: model(batch), show_progress_bar=False)
    none = dict(prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None)
    peft.initialize_lora_eva_weights(theirs, [x], **others, **none)
    ours = rw.apply_lora(plain(torch.float32), CONFIG, first_values=rw.EVA([x], rho=rho))
    layers = {n: m for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert ranks_of(ours) == {name: layer.r["default"] for name, layer in layers.items()}
    for name, layer in layers.items():
        own, A = ours.get_submodule(name), layer.lora_A["default"].weight
        assert own.alpha == layer.lora_alpha["default"]
        assert ((own.lora_A * A).sum(1).abs() - 1).abs().max() < 1e-4
        assert own.scaling == layer.scaling["default"]


@pytest.mark.parametrize("rslora", [False, True])
def test_alphas_of_rslora_are_pefts_too(rslora):
    config = rw.LoRAConfig(rank=5, alpha=10.0, rslora=rslora, target_modules=["0", "2", "4"])
    model = rw.apply_lora(plain(), config, first_values=rw.EVA([rows()]))
    for layer in (model[0], model[2], model[4]):
        assert layer.alpha == 10.0 * layer.rank / 5


def test_a_layer_without_a_direction_gets_no_adapter(tmp_path):
    """All of its variance is spread over 20 directions, the others' is in one or two."""
    model = nn.Sequential(nn.Linear(20, 2), nn.Linear(2, 20), nn.Linear(20, 20)).double()
    torch.manual_seed(0)
    config = rw.LoRAConfig(rank=1, alpha=2.0, target_modules=["0", "1", "2"])
    x = torch.linalg.qr(torch.randn(400, 20).double())[0]
    rw.apply_lora(model, config, first_values=rw.EVA([x], rho=3))
    assert type(model[0]) is nn.Linear
    assert sum(ranks_of(model).values()) == 3
    rw.save_adapter(model, tmp_path)
    assert peft.LoraConfig.from_pretrained(tmp_path).target_modules == {"1", "2"}


def test_padding_does_not_count():
    model = bert().double().eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 40, (6, 9), generator=generator)
    mask = torch.ones_like(tokens)
    mask[:, 6:] = 0
    config = rw.LoRAConfig(rank=2, target_modules=["query", "dense"])
    padded = tokens.clone()
    padded[:, 6:] = 0
    other = tokens.clone()
    other[:, 6:] = 1
    found = [
        rw.apply_lora(
            copy.deepcopy(model),
            config,
            first_values=rw.EVA([{"input_ids": ids, "attention_mask": mask}]),
        )
        for ids in (padded, other)
    ]
    assert ranks_of(found[0]) == ranks_of(found[1])
    for own, same in zip(*(m.parameters() for m in found), strict=True):
        assert own.shape == same.shape
    A, B = (m.encoder.layer[0].attention.self.query.lora_A for m in found)
    assert ((A * B).sum(1).abs() - 1).abs().max() < 1e-9


def test_a_transformers_model_with_named_inputs_and_ties():
    """query and value of a block see one input: its ties go by the order of layers."""
    model = bert().double().eval()
    before = output(model)
    ids = torch.arange(2, 38).view(4, 9)
    config = rw.LoRAConfig(rank=2, target_modules=["query", "value"])
    rw.apply_lora(model, config, first_values=rw.EVA([{"input_ids": ids}]))
    assert_same_bits(output(model), before, "output")
    ranks = ranks_of(model)
    assert sum(ranks.values()) == 8
    for name in ranks:
        if name.endswith("value"):
            query = name.replace("value", "query")
            assert ranks[query] - 1 <= ranks[name] <= ranks[query]


@pytest.mark.parametrize("quantise", QUANTISED)
def test_over_a_quantised_base(quantise):
    model = quantise(quantisable())
    x = batch()
    before = model(x)
    config = rw.LoRAConfig(rank=2, target_modules=["0", "2"])
    with pytest.raises(ValueError, match="PiSSA: '0' is quantised.*dequantize.*or use EVA"):
        rw.apply_lora(model, config, first_values=rw.PiSSA())
    assert_same_bits(model(x), before, "refused")
    rw.apply_lora(model, config, first_values=rw.EVA([x]))
    assert_same_bits(model(x), before, "output")
    assert sum(ranks_of(model).values()) == 4
    _, directions = principal(x.double())
    A = model[0].lora_A.double()
    assert ((A * directions[: len(A)]).sum(1).abs() - 1).abs().max() < 1e-4


def test_first_ranks_of_a_spectral_allocator():
    options = dict(total_steps=20, allocation_interval=5, max_rank=8)
    config = rw.SpectralConfig(initial_rank=5, target_modules=["0", "2", "4"], **options)
    model = rw.apply_lora(plain(), config, first_values=rw.EVA([rows()]))
    ranks = ranks_of(model)
    assert sum(ranks.values()) == 15 and len(set(ranks.values())) > 1
    assert {layer.capacity for layer in rw.summary(model).layers} == {8}
    assert {layer.scaling for layer in rw.summary(model).layers} == {16.0 / 5}
    allocator = rw.SpectralAllocator(model, config)
    assert allocator.ranks == ranks
    assert allocator.budget == sum(r * (20 + (16 if n == "4" else 20)) for n, r in ranks.items())


def test_another_adapter_is_chosen_by_the_bases_inputs():
    model, x = rw.apply_lora(plain(), CONFIG, first_values=rw.PiSSA()), rows()
    nn.init.normal_(model[0].lora_B)
    rw.add_adapter(model, "b", CONFIG, first_values=rw.EVA([x]))
    rw.activate_adapter(model, "b")
    fresh = rw.apply_lora(plain(), CONFIG, first_values=rw.EVA([x]))
    assert ranks_of(model) == ranks_of(fresh)
    assert torch.equal(model[2].lora_A, fresh[2].lora_A)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compiled", "parallel"])
def test_a_model_in_wrappers(wrap):
    inner = plain()
    rw.apply_lora(wrap(inner), CONFIG, first_values=rw.EVA([rows()]))
    fresh = rw.apply_lora(plain(), CONFIG, first_values=rw.EVA([rows()]))
    assert ranks_of(inner) == ranks_of(fresh)
    assert torch.equal(inner[4].lora_A, fresh[4].lora_A)


def test_the_models_modes_and_hooks_are_as_before():
    model = nn.Sequential(nn.Linear(20, 20), nn.BatchNorm1d(20), nn.Dropout(0.5), nn.Linear(20, 4))
    model[1].eval()
    training = [module.training for module in model.modules()]
    mean = model[1].running_mean.clone()
    state = torch.random.get_rng_state()
    config = rw.LoRAConfig(rank=2, target_modules=["0", "3"])
    x = rows(dtype=torch.float32)
    eva = rw.EVA([x])
    eva.find(*_found(model, config))
    assert [module.training for module in model.modules()] == training
    assert torch.equal(model[1].running_mean, mean)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not model[0]._forward_pre_hooks and not model[0]._forward_pre_hooks_with_kwargs


def _found(model, config):
    from rankwise.nn import adapt
    from rankwise.prepared import plan
    from rankwise.tree import Tree

    tree = Tree(model)
    options, _ = plan(tree, config)
    return tree, {p: adapt(tree.modules[p], options[p]) for p in options}, options
