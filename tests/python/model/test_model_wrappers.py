# Names are those of the plain model, whatever stands around it or its parts: in every call.
import copy
import pickle

import pytest
import torch
import transformers
from small_models import llama, randomise
from torch import nn
from wrapped_models import (
    WRAPPERS,
    Hiding,
    checkpoint_wrapper,
    compiled,
    parts_wrapped,
    plain,
    wrapped,
)

import rankwise as rw
from rankwise.tree import Tree

LAYERS = ["0", "2"]
X = torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(2, 8)


def names(model: nn.Module) -> list[str]:
    return [layer.name for layer in rw.summary(model).layers]


def config(**options) -> rw.LoRAConfig:
    return rw.LoRAConfig(**{"rank": 2, "target_modules": LAYERS, **options})


@pytest.mark.parametrize("wrap", [wrapped, parts_wrapped])
@pytest.mark.parametrize("kind", WRAPPERS)
def test_applied_to_a_wrapped_model_and_computed_there(kind, wrap):
    options = config(rank_pattern={"2": 3})
    model, reference = wrap(kind), rw.apply_lora(plain(), options)
    assert rw.apply_lora(model, options) is model
    assert names(model) == LAYERS
    assert [layer.rank for layer in rw.summary(model).layers] == [2, 3]
    randomise(model), randomise(reference)
    torch.testing.assert_close(model(X), reference(X), rtol=1e-12, atol=1e-12)
    rw.activate_adapter(model, None)
    torch.testing.assert_close(model(X), plain()(X), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapped_head_is_trained_whole_and_switched(kind):
    options = config(target_modules=["0"], modules_to_save=["2"])
    model = rw.apply_lora(parts_wrapped(kind), options)
    reference = rw.apply_lora(plain(), options)
    for this in (model, reference):
        rw.add_adapter(this, "other", options)
        for seed, name in enumerate(("other", "default")):
            rw.activate_adapter(this, name)
            randomise(this, seed)
    for name in ("default", "other", None, "default"):
        rw.activate_adapter(model, name), rw.activate_adapter(reference, name)
        torch.testing.assert_close(model(X), reference(X), rtol=1e-12, atol=1e-12)
    with rw.disable_adapters(model):
        torch.testing.assert_close(model(X), plain()(X), rtol=1e-12, atol=1e-12)
    rw.delete_adapter(model, "default")
    assert rw.adapter_names(model) == ["other"]


@pytest.mark.parametrize("kind", WRAPPERS)
def test_one_state_inside_and_outside_of_the_wrapper(kind):
    inner = plain()
    outer = wrapped(kind, inner)
    rw.apply_lora(outer, config(modules_to_save=["1"]), "first")
    inner = Tree(outer).model  # averaging makes a copy
    rw.add_adapter(inner, "second", config(rank=1))
    rw.activate_adapter(outer, "second")
    assert rw.adapter_names(outer) == rw.adapter_names(inner) == ["first", "second"]
    assert vars(inner)["_rankwise"].active == "second"
    for model in (outer, inner):
        assert list(rw.merge(model)) == LAYERS
        rw.unmerge(model)
    again = wrapped(kind, inner)
    rw.activate_adapter(again, "first")
    assert rw.adapter_names(again) == ["first", "second"]


@pytest.mark.parametrize("form", [["module.0"], ["module"], "module.*", "all-linear"])
def test_a_child_called_as_a_wrappers_keeps_its_name(form):
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(8, 8) if form == ["module"] else nn.Sequential(nn.Linear(8, 8))
            self._orig_mod = nn.Tanh()

        def forward(self, x):
            return self._orig_mod(self.module(x))

    wanted = ["module" if form == ["module"] else "module.0"]
    for wrap in (lambda m: m, nn.DataParallel, compiled, lambda m: nn.DataParallel(Hiding(m))):
        assert names(rw.apply_lora(wrap(Mine()), config(target_modules=form))) == wanted


def test_names_with_the_wrappers_parts_mean_the_same():
    parts = config(target_modules=["_orig_mod.0", "2"], rank_pattern={"_orig_mod.2": 5})
    for model in (compiled(plain()), plain()):
        rw.apply_lora(model, parts)
        assert {layer.name: layer.rank for layer in rw.summary(model).layers} == {"0": 2, "2": 5}
    with pytest.raises(ValueError, match="'module' matches no module"):
        rw.apply_lora(plain(), config(target_modules=["module"]))


def test_one_layer_wrapped_twice_is_adapted_once():
    model = plain()
    model[2] = checkpoint_wrapper(model[0])
    model[0] = compiled(model[0])
    options = config(target_modules=["2"], rank_pattern={"0": 3})
    rw.apply_lora(model, options)
    assert Tree(model).names[Tree(model).modules["0"]] == LAYERS
    assert [(layer.name, layer.rank) for layer in rw.summary(model).layers] == [("0", 3)]
    randomise(model)
    layer = Tree(model).modules["2"]
    torch.testing.assert_close(model(X), layer(torch.tanh(layer(X))), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wrap", [wrapped, parts_wrapped])
@pytest.mark.parametrize("kind", ["compiled", "averaged", "hiding"])
def test_a_copy_of_a_wrapped_model_has_its_adapters(kind, wrap):
    model = wrap(kind)
    rw.apply_lora(model, config(modules_to_save=["1"]), "mine")
    randomise(model)
    twin = copy.deepcopy(model)
    assert rw.adapter_names(twin) == ["mine"] and names(twin) == LAYERS
    torch.testing.assert_close(twin(X), model(X), rtol=1e-12, atol=1e-12)


def test_a_pickled_averaged_model_has_its_adapters():
    model = rw.apply_lora(wrapped("averaged"), config(), "mine")
    assert rw.adapter_names(pickle.loads(pickle.dumps(model))) == ["mine"]


@pytest.mark.parametrize("wrap", [wrapped, parts_wrapped])
@pytest.mark.parametrize("kind", WRAPPERS)
def test_unloaded_inside_of_its_wrappers(kind, wrap):
    model = rw.apply_lora(wrap(kind), config())
    randomise(model)
    y = model(X).detach()
    rw.merge(model)
    assert rw.unload(model) is model
    assert {type(Tree(model).modules[name]) for name in LAYERS} == {nn.Linear}
    torch.testing.assert_close(model(X), y, rtol=1e-12, atol=1e-12)


def test_a_wrapper_that_holds_a_model_twice():
    class Fabric(nn.Module):
        """As Lightning Fabric's: known by its name."""

        __module__, __qualname__ = "lightning.fabric.wrappers", "_FabricModule"

        def __init__(self, inner):
            super().__init__()
            self._forward_module, self._original_module = nn.DataParallel(inner), inner

        def forward(self, x):
            return self._forward_module(x)

    model, reference = Fabric(plain()), rw.apply_lora(plain(), config())
    rw.apply_lora(model, config())
    assert names(model) == LAYERS
    torch.testing.assert_close(randomise(model)(X), randomise(reference)(X), rtol=1e-12, atol=1e-12)


def test_all_linear_leaves_a_compiled_output_layer():
    model, reference = llama(), rw.apply_lora(llama(), config(target_modules="all-linear"))
    model.lm_head = compiled(model.lm_head)
    model.model.layers[1] = checkpoint_wrapper(model.model.layers[1])
    rw.apply_lora(nn.DataParallel(model), config(target_modules="all-linear"))
    assert names(model) == names(reference)


def test_layers_of_an_encoder_in_wrappers():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 2)
    for i in range(2):
        encoder.layers[i] = checkpoint_wrapper(encoder.layers[i])
    rw.apply_lora(encoder.eval(), config(target_modules=["linear1"]))
    assert names(encoder) == ["layers.0.linear1", "layers.1.linear1"]
    assert encoder.use_nested_tensor is False


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel, lambda m: m])
def test_problems_and_refusals_name_the_plain_models_modules(wrap):
    model = parts_wrapped("compiled")
    model.append(nn.Sequential(compiled(nn.Linear(8, 8))).double())
    rw.apply_lora(wrap(model), config(modules_to_save=["3"]))
    problems = rw.health_check(wrap(model)).problems
    factors = [f"{layer}.lora_{f}" for layer in LAYERS for f in "AB"]
    assert [p.split(":")[0] for p in problems] == [*factors, "3.0.weight", "3.0.bias"]
    with pytest.raises(ValueError, match=r"'4' matches no module; (did you mean|names end in) '0'"):
        rw.add_adapter(wrap(model), "b", config(target_modules=["4"]))


def test_the_allocators_names_and_state_are_the_plain_models():
    schedule = rw.AdaLoRAConfig(initial_rank=3, target_rank=1, total_steps=9, target_modules=LAYERS)

    def allocator(model):
        return rw.RankAllocator(rw.apply_lora(model, schedule), schedule)

    def step(model, allocator):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        allocator.attach(optimizer)
        model(X).sum().backward()
        optimizer.step()

    models = [wrapped("compiled"), parts_wrapped("data-parallel"), plain()]
    allocators = [allocator(model) for model in models]
    for model, this in zip(models, allocators, strict=True):
        step(randomise(model), this)
        assert list(this.ranks) == list(this.pattern) == LAYERS
    wanted = allocators[-1].state_dict()
    for this in allocators:
        state = this.state_dict()
        assert state.keys() == wanted.keys()
        for other in map(allocator, (wrapped("averaged"), plain())):
            other.load_state_dict(state)
            for name, value in other.state_dict().items():
                torch.testing.assert_close(value, wanted[name], rtol=1e-9, atol=1e-12)
    earlier = {f"_orig_mod.{n}" if n[0] in "02" else n: v for n, v in wanted.items()}
    allocators[0].load_state_dict(earlier)


def test_the_base_models_name_is_read_inside_of_wrappers(tmp_path):
    inner = transformers.BertModel(transformers.BertConfig(**{
        "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        "intermediate_size": 8, "name_or_path": "some/base",
    }))  # fmt: skip
    model = nn.DataParallel(rw.apply_lora(inner, config(target_modules=["query"])))
    rw.save_adapter(model, tmp_path)
    assert (
        '"base_model_name_or_path": "some/base"' in (tmp_path / "adapter_config.json").read_text()
    )
