# apply_lora on real architectures: each computes what the plain model with merged weights would.
import copy

import pytest
import torch
from small_models import BUILDERS, adapted, bert, deltas, gpt2, inputs, llama, output, randomise
from tolerances import assert_same_bits
from torch import nn
from transformers.pytorch_utils import Conv1D

import rankwise as rw
from rankwise.nn import LoRAEmbedding, LoRALinear

TARGETS = {
    "bert": ["query", "value", "output.dense", "word_embeddings", "position_embeddings"],
    "bert_classifier": r"bert\.encoder\..*\.(query|key|dense)|classifier",
    "gpt2": ["c_attn", "c_proj", "wpe"],
    "llama": ["q_proj", "v_proj", "down_proj", "lm_head", "embed_tokens"],
    "llama_tied": "all-linear",
    "t5": ["q", "v", "wi", "wo", "relative_attention_bias"],
}


@pytest.fixture(params=TARGETS)
def models(request):
    """(plain model in float64, the same adapted with a random adapter, its config)."""
    plain = BUILDERS[request.param]().double().eval()
    config = rw.LoRAConfig(rank=3, alpha=6.0, target_modules=TARGETS[request.param])
    return plain, rw.apply_lora(copy.deepcopy(plain), config), config


def test_output_is_the_plain_models_at_the_start(models):
    plain, model, _ = models
    torch.testing.assert_close(output(model), output(plain), rtol=1e-12, atol=1e-12)


def test_output_is_that_of_the_plain_model_with_the_sums_as_weights(models):
    plain, model, _ = models
    randomise(model)
    assert not torch.allclose(output(model), output(plain), atol=1e-3)
    with torch.no_grad():
        for name, delta in deltas(model).items():
            plain.get_submodule(name).weight.add_(delta)
    torch.testing.assert_close(output(model), output(plain), rtol=1e-9, atol=1e-10)


def test_gradients_are_those_of_the_dense_weight_projected(models):
    """dA = scaling B^T dW, dB = scaling dW A^T."""
    plain, model, _ = models
    randomise(model)
    with torch.no_grad():
        for name, delta in deltas(model).items():
            plain.get_submodule(name).weight.add_(delta)
    direction = torch.randn_like(output(plain))
    (output(model) * direction).sum().backward()
    (output(plain) * direction).sum().backward()
    for name, layer in adapted(model).items():
        dense = plain.get_submodule(name).weight.grad
        dense = dense.t() if layer.transposed else dense
        for factor, wanted in (
            (layer.lora_A, layer.scaling * layer.lora_B.t() @ dense),
            (layer.lora_B, layer.scaling * dense @ layer.lora_A.t()),
        ):
            size = wanted.abs().max().item()
            torch.testing.assert_close(factor.grad, wanted.detach(), rtol=1e-7, atol=1e-9 * size)


def test_only_factors_train_and_the_names_of_the_base_stay(models):
    plain, model, _ = models
    state = model.state_dict()
    assert [name for name in state if "lora" not in name] == list(plain.state_dict())
    for name, value in plain.state_dict().items():
        assert_same_bits(state[name], value, name)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {n + f for n in adapted(model) for f in (".lora_A", ".lora_B")}


def test_a_plain_checkpoint_loads_strictly_into_the_adapted_model(models):
    plain, model, _ = models
    model.load_state_dict(plain.state_dict(), strict=True)


def test_layers_share_the_parameters_that_were_there():
    model = gpt2()
    weights = {n: m.weight for n, m in model.named_modules() if isinstance(m, Conv1D)}
    returned = rw.apply_lora(model, rw.LoRAConfig(target_modules=["c_attn", "c_fc", "c_proj"]))
    assert returned is model
    assert set(adapted(model)) == set(weights)
    for name, layer in adapted(model).items():
        assert type(layer) is LoRALinear and layer.transposed
        assert layer.weight is weights[name]


def test_embeddings_become_embedding_layers():
    model = rw.apply_lora(bert(), rw.LoRAConfig(target_modules=["word_embeddings"]))
    layer = model.embeddings.word_embeddings
    assert type(layer) is LoRAEmbedding and layer.padding_idx == 0


def test_an_untied_head_is_adapted_and_a_tied_one_is_left():
    config = rw.LoRAConfig(target_modules=["lm_head"])
    assert set(adapted(rw.apply_lora(llama(), config))) == {"lm_head"}
    model = rw.apply_lora(llama(tied=True), rw.LoRAConfig(target_modules="all-linear"))
    assert "lm_head" not in adapted(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_generation_with_a_cache_is_the_same_as_without():
    model = randomise(rw.apply_lora(llama().double(), rw.LoRAConfig(target_modules="all-linear")))
    model.eval()
    tokens = inputs(model)["input_ids"]
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    cached = model.generate(tokens, use_cache=True, **options)
    assert torch.equal(cached, model.generate(tokens, use_cache=False, **options))
    assert cached.shape == (2, 12)


@pytest.mark.parametrize("asked", [None, torch.float32, torch.bfloat16])
def test_sixteen_bit_models_keep_their_output_dtype(asked):
    model = bert().bfloat16().eval()
    rw.apply_lora(model, rw.LoRAConfig(target_modules="all-linear", adapter_dtype=asked))
    assert output(randomise(model)).dtype == torch.bfloat16
    wanted = asked or torch.float32
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {wanted}


def test_a_model_on_the_meta_device_is_adapted_without_memory():
    with torch.device("meta"):
        model = bert()
    rw.apply_lora(model, rw.LoRAConfig(target_modules="all-linear"))
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_plain_module_with_lists_and_dicts_of_layers():
    model = nn.Module()
    model.list = nn.ModuleList([nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))])
    model.table = nn.ModuleDict({"q": nn.Linear(4, 4), "other": nn.LayerNorm(4)})
    rw.apply_lora(model, rw.LoRAConfig(target_modules=["list.0", "list.1.0", "table.q"]))
    assert set(adapted(model)) == {"list.0", "list.1.0", "table.q"}
    assert model.list[1][0] is model.get_submodule("list.1.0")
