# Which modules get an adapter: suffix lists, regular expressions, "all-linear", patterns, ties.
import copy

import peft
import pytest
import torch
from small_models import BUILDERS, adapted, bert, gpt2, llama, output, randomise
from torch import nn

import rankwise as rw


def chosen(model: nn.Module, **config) -> set[str]:
    return set(adapted(rw.apply_lora(model, rw.LoRAConfig(**config))))


SELECTIONS = [
    ("bert", {"target_modules": ["query", "value"]}),
    ("bert", {"target_modules": ["attention.output.dense"]}),
    ("bert", {"target_modules": ["encoder.layer.1.attention.self.query", "key"]}),
    ("bert", {"target_modules": "all-linear"}),
    ("bert", {"target_modules": "all-linear", "exclude_modules": ["pooler.dense", "query"]}),
    ("bert", {"target_modules": r".*\.layer\.1\..*(query|value)"}),
    ("bert", {"target_modules": ["dense"], "exclude_modules": r".*attention.*"}),
    ("bert", {"target_modules": ["word_embeddings", "query"]}),
    ("bert_classifier", {"target_modules": "all-linear", "modules_to_save": ["classifier"]}),
    ("bert_classifier", {"target_modules": ["dense"], "modules_to_save": ["pooler", "classifier"]}),
    ("gpt2", {"target_modules": ["c_attn"]}),
    ("gpt2", {"target_modules": "all-linear"}),
    ("gpt2", {"target_modules": r"transformer\.h\.0\..*c_(attn|proj)"}),
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    ("llama_tied", {"target_modules": "all-linear"}),
    ("t5", {"target_modules": "all-linear"}),
    ("t5", {"target_modules": ["q", "v"]}),
    ("t5", {"target_modules": r"decoder\..*\.(EncDecAttention)\.[qv]"}),
]


@pytest.mark.parametrize("architecture, config", SELECTIONS)
@pytest.mark.filterwarnings("ignore")
def test_the_same_modules_as_peft(architecture, config):
    model = BUILDERS[architecture]()
    stock = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, **config))
    layers = {
        name.removeprefix("base_model.model.")
        for name, module in stock.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert chosen(model, rank=2, **config) == layers


def test_a_suffix_ends_at_a_dot():
    model = nn.ModuleDict({"q": nn.Linear(2, 2), "aq": nn.Linear(2, 2), "b_q": nn.Linear(2, 2)})
    assert chosen(model, target_modules=["q"]) == {"q"}


def test_a_regular_expression_matches_whole_names():
    model = nn.ModuleDict({"q": nn.Linear(2, 2), "aq": nn.Linear(2, 2), "qb": nn.Linear(2, 2)})
    assert chosen(model, target_modules="q|x") == {"q"}


def test_all_linear_leaves_embeddings_the_head_and_what_is_no_linear():
    names = chosen(gpt2(), target_modules="all-linear")
    assert len(names) == 8 and not any("wte" in n or "wpe" in n or "lm_head" in n for n in names)


@pytest.mark.parametrize("form", [list, tuple, set])
def test_names_in_any_collection(form):
    assert len(chosen(bert(), target_modules=form(["query", "key"]))) == 4


def test_what_is_trained_whole_gets_no_adapter_inside():
    model = BUILDERS["bert_classifier"]()
    names = chosen(model, target_modules="all-linear", modules_to_save=["pooler", "classifier"])
    assert len(names) == 12 and all(name.startswith("bert.encoder.") for name in names)


def test_rank_and_alpha_patterns_by_suffix_name_and_regular_expression():
    config = rw.LoRAConfig(
        rank=8,
        alpha=16.0,
        target_modules=["query", "key", "value"],
        rank_pattern={"encoder.layer.0.attention.self.key": 2, r"layer\.1\..*(query|key)": 4},
        alpha_pattern={"value": 1.0, "key": 6.0},
    )
    layers = adapted(rw.apply_lora(bert(), config))
    found = {n.removeprefix("encoder."): (m.rank, m.alpha, m.scaling) for n, m in layers.items()}
    place = "layer.{}.attention.self.{}"
    assert found == {
        place.format(0, "query"): (8, 16.0, 2.0),
        place.format(0, "key"): (2, 6.0, 3.0),
        place.format(0, "value"): (8, 1.0, 0.125),
        place.format(1, "query"): (4, 16.0, 4.0),
        place.format(1, "key"): (4, 6.0, 1.5),
        place.format(1, "value"): (8, 1.0, 0.125),
    }


def test_the_first_pattern_that_fits_counts_and_zero_is_a_rank():
    config = rw.LoRAConfig(
        target_modules=["query"],
        rank_pattern={r"layer\.0\..*": 0, "query": 3},
        alpha_pattern={"query": 0.0},
    )
    layers = list(adapted(rw.apply_lora(bert(), config)).values())
    assert [layer.rank for layer in layers] == [0, 3]
    assert [layer.alpha for layer in layers] == [0.0, 0.0]


def test_patterns_mean_whole_name_parts():
    model = nn.ModuleDict({"q": nn.Linear(2, 2), "aq": nn.Linear(2, 2)})
    config = rw.LoRAConfig(rank=4, target_modules=["q", "aq"], rank_pattern={"q": 1})
    layers = adapted(rw.apply_lora(model, config))
    assert {name: layer.rank for name, layer in layers.items()} == {"q": 1, "aq": 4}


def test_rslora_and_init_reach_every_layer():
    config = rw.LoRAConfig(
        rank=4, alpha=8.0, target_modules=["query"], rslora=True, init="swapped", dropout=0.25
    )
    for layer in adapted(rw.apply_lora(bert(), config)).values():
        assert (layer.scaling, layer.dropout) == (4.0, 0.25)
        assert not layer.lora_A.any() and layer.lora_B.any()


class Twice(nn.Module):
    """One linear at two places, used twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.block = nn.ModuleDict({"again": self.first, "other": nn.Linear(4, 4)})

    def forward(self, x):
        return self.block["other"](self.block["again"](self.first(x).tanh()).tanh())


@pytest.mark.parametrize("targets", [["first"], ["again"], ["first", "again"], "block.again"])
def test_a_module_at_two_places_is_adapted_once(targets):
    model = Twice().double()
    plain = copy.deepcopy(model)
    rw.apply_lora(model, rw.LoRAConfig(rank=2, target_modules=targets))
    assert model.first is model.block["again"]
    assert isinstance(model.first, rw.nn.LoRALinear)
    assert type(model.block["other"]) is nn.Linear
    randomise(model)
    x = torch.randn(3, 4, dtype=torch.float64)
    with torch.no_grad():
        plain.first.weight.add_(model.first.scaling * model.first.lora_B @ model.first.lora_A)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)
    assert rw.summary(model).trainable == 16
    assert len(rw.merge(model)) == 1
    torch.testing.assert_close(model.eval()(x), plain(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["first", "again"])
def test_patterns_and_exclusions_by_either_name_of_a_shared_module(name):
    config = rw.LoRAConfig(rank=2, target_modules=["first", "other"], rank_pattern={name: 3})
    model = rw.apply_lora(Twice(), config)
    assert (model.first.rank, model.block["other"].rank) == (3, 2)
    config = rw.LoRAConfig(target_modules="all-linear", exclude_modules=[name])
    assert set(adapted(rw.apply_lora(Twice(), config))) == {"block.other"}


def test_a_second_adapter_targets_adapted_and_plain_layers():
    model = rw.apply_lora(llama().double(), rw.LoRAConfig(rank=2, target_modules=["q_proj"]))
    rw.add_adapter(model, "wide", rw.LoRAConfig(rank=3, target_modules=["q_proj", "up_proj"]))
    before = output(model)
    rw.activate_adapter(model, "wide")
    randomise(model)
    used = {n.split(".")[-1] for n, layer in adapted(model).items() if layer.adapter == "wide"}
    assert used == {"q_proj", "up_proj"}
    assert not torch.allclose(output(model), before)
    rw.activate_adapter(model, "default")
    torch.testing.assert_close(output(model), before, rtol=0, atol=0)
