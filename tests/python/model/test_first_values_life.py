# Adapters that begin inside the base, in all that a model goes through: never silently wrong.
import copy
import pickle

import pytest
import torch
from first_models import CONFIG, INSIDE, begun, loss, plain, rows, trained
from small_models import assert_unchanged, fingerprint, llama, randomise
from tolerances import assert_same_bits
from torch import nn

import rankwise as rw

every = pytest.mark.parametrize("kind", INSIDE)


def effective(layer: nn.Module) -> torch.Tensor:
    """W0 + scaling * (B A - B0 A0), with B0 A0 from the layer's buffers."""
    first = layer.lora_first
    own = layer.lora_B[:, : layer.rank] @ layer.lora_A[: layer.rank]
    return layer.weight + layer.scaling * (own + first.lora_B @ first.lora_A)


@every
def test_disabled_is_the_untouched_model(kind):
    model, x = trained(begun(kind)), rows()
    with rw.disable_adapters(model):
        assert_same_bits(model(x), plain()(x), kind)
    rw.activate_adapter(model, None)
    assert_same_bits(model(x), plain()(x), kind)
    rw.activate_adapter(model, "default")
    assert (model(x) - plain()(x)).abs().max() > 1e-3


@every
def test_unload_gives_the_untouched_model_back(kind):
    model = trained(begun(kind))
    weights = [model[0].weight, model[2].weight]
    rw.unload(model)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Tanh, nn.Linear]
    assert vars(model[0]).keys() == vars(plain()[0]).keys()
    assert model[0]._modules == {} and model[0].weight is weights[0]
    for name, value in plain().state_dict().items():
        assert_same_bits(model.state_dict()[name], value, name)


@every
def test_merge_and_unmerge(kind):
    model, x = trained(begun(kind)), rows()
    wanted, weights = model(x), [effective(layer) for layer in (model[0], model[2])]
    rw.merge(model.eval())
    assert list(model.state_dict()) == list(plain().state_dict())
    for layer, weight in zip((model[0], model[2]), weights, strict=True):
        assert (layer.weight - weight).abs().max() < 1e-12
    assert (model(x) - wanted).abs().max() < 1e-12
    with rw.disable_adapters(model):
        assert_same_bits(model(x), plain()(x), "disabled while merged")
    rw.unmerge(model)
    assert_same_bits(model(x), wanted, "unmerged")
    rw.merge(model)
    rw.unload(model)
    assert (model(x) - wanted).abs().max() < 1e-12


def test_merged_at_the_start_no_weight_changes_by_a_bit():
    model = rw.apply_lora(plain(torch.float32), CONFIG, first_values=rw.PiSSA())
    reports = rw.merge(model)
    assert [report.changed for report in reports.values()] == [0, 0]


def test_named_adapters_stand_over_one_untouched_base():
    model, x = trained(begun("pissa", name="a")), rows()
    outputs = {"a": model(x), None: plain()(x)}
    rw.add_adapter(model, "b", CONFIG)
    rw.add_adapter(model, "c", CONFIG, first_values=rw.OLoRA())
    others = rw.LoRAConfig(rank=2, target_modules=["2"])
    rw.add_adapter(model, "d", others, first_values=rw.LoRAGA([x], loss))
    for name in ("b", "c", "d"):
        rw.activate_adapter(model, name)
        assert (model(x) - outputs[None]).abs().max() < 1e-12
        outputs[name] = trained(model)(x)
    for name in ("a", "d", None, "c", "b", "a"):
        rw.activate_adapter(model, name)
        assert_same_bits(model(x), outputs[name], str(name))
    rw.delete_adapter(model, "a")
    assert_same_bits(model(x), outputs[None], "deleted")
    assert not any("lora_first" in key for key in model[2].state_dict() if ".c." not in f".{key}"
                   and ".d." not in f".{key}")  # fmt: skip
    rw.activate_adapter(model, "c")
    assert_same_bits(model(x), outputs["c"], "c")


def test_first_values_are_those_of_the_base_whatever_is_active_or_merged():
    model = trained(begun("pissa"))
    rw.merge(model.eval())
    rw.add_adapter(model, "b", CONFIG, first_values=rw.PiSSA())
    rw.unmerge(model)
    rw.activate_adapter(model, "b")
    fresh = begun("pissa")
    assert torch.equal(model[0].lora_A, fresh[0].lora_A)
    assert (model(rows()) - plain()(rows())).abs().max() < 1e-12


def test_a_second_apply_lora_is_refused():
    model = begun("pissa")
    before = fingerprint(model)
    with pytest.raises(ValueError, match="has adapters already; use add_adapter"):
        rw.apply_lora(model, CONFIG, first_values=rw.PiSSA())
    assert_unchanged(model, before)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_are_whole_and_their_own(way):
    model, x = trained(begun("olora")), rows()
    rw.add_adapter(model, "b", CONFIG, first_values=rw.PiSSA())
    other = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert_same_bits(other(x), model(x), way)
    before = model(x)
    with torch.no_grad():
        other[0].lora_first.lora_A.zero_()
    assert_same_bits(model(x), before, way)
    rw.activate_adapter(other, "b")
    assert (other(x) - plain()(x)).abs().max() < 1e-12


def test_a_state_goes_into_a_model_made_the_same_way():
    model, other, x = trained(begun("pissa")), plain(), rows()
    nn.init.normal_(other[0].weight)
    rw.apply_lora(other, CONFIG, first_values=rw.PiSSA())
    other.load_state_dict(model.state_dict())
    assert_same_bits(other(x), model(x), "loaded")
    rw.unload(other)
    assert_same_bits(other(x), plain()(x), "the base in it")


def test_a_state_in_a_plain_model_is_the_untouched_base():
    model, x = plain(), rows()
    nn.init.normal_(model[0].weight)
    found = model.load_state_dict(trained(begun("pissa")).state_dict(), strict=False)
    assert not found.missing_keys
    assert_same_bits(model(x), plain()(x), "plain")


def test_a_plain_state_gives_another_base():
    model, other, x = begun("pissa"), plain(), rows()
    nn.init.normal_(other[0].weight)
    model.load_state_dict(other.state_dict())
    assert (model(x) - other(x)).abs().max() < 1e-12


@pytest.mark.parametrize("strict", [True, False])
def test_states_with_and_without_first_factors_do_not_mix(strict):
    inside, outside = trained(begun("pissa")), trained(rw.apply_lora(plain(), CONFIG))
    factors = {k: v for k, v in inside.state_dict().items() if "lora_first" not in k}
    constant = dict(inside.named_buffers())
    for state, model in (
        (inside.state_dict(), outside),
        (outside.state_dict(), inside),
        (factors, inside),
        (constant, inside),
    ):
        before = fingerprint(model)
        with pytest.raises(RuntimeError, match=r"0\.lora_first: of the state and the model one"):
            model.load_state_dict(copy.deepcopy(state), strict=strict)
        assert_unchanged(model, before)


def test_moved_ranks_leave_the_first_factors():
    options = dict(total_steps=40, allocation_interval=5, final_steps=10, max_rank=8)
    options["rule"] = lambda question: [2, 6]
    config = rw.SpectralConfig(initial_rank=4, alpha=8.0, target_modules=["0", "2"], **options)
    model, x = rw.apply_lora(plain(), config, first_values=rw.PiSSA()), rows()
    assert (model(x) - plain()(x)).abs().max() < 1e-12
    first = copy.deepcopy(model[0].lora_first.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    allocator = rw.SpectralAllocator(model, config)
    allocator.attach(optimizer)
    for _ in range(40):
        optimizer.zero_grad()
        loss(model, x).backward()
        optimizer.step()
    assert any(event.change > 0 for event in allocator.history)
    assert allocator.ranks == {"0": 2, "2": 6}
    for name, value in first.items():
        assert_same_bits(model[0].lora_first.state_dict()[name], value, name)
    layers = [effective(layer) for layer in (model[0], model[2])]
    hidden = torch.tanh(x @ layers[0].t() + model[0].bias)
    assert (model(x) - hidden @ layers[1].t() - model[2].bias).abs().max() < 1e-12
    with rw.disable_adapters(model):
        assert_same_bits(model(x), plain()(x), "disabled")


def test_ranks_move_as_over_a_base_that_gave_the_first_values_up():
    config = rw.SpectralConfig(
        initial_rank=4, alpha=8.0, total_steps=40, allocation_interval=5, max_rank=8,
        final_budget=210, probes=2, target_modules=["0", "2"],
    )  # fmt: skip
    ours = rw.apply_lora(plain(), config, first_values=rw.PiSSA())
    other = rw.apply_lora(plain(), config)
    with torch.no_grad():
        for name in "02":
            layer, own = other.get_submodule(name), ours.get_submodule(name)
            layer.weight -= own.scaling * own.lora_B @ own.lora_A
            layer.lora_A.copy_(own.lora_A)
            layer.lora_B.copy_(own.lora_B)
    allocators = []
    for model in (ours, other):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        allocators.append(rw.SpectralAllocator(model, config))
        allocators[-1].attach(optimizer)
        for _ in range(40):
            optimizer.zero_grad()
            (model(rows()) - rows()[:, :16]).square().mean().backward()
            optimizer.step()
    assert allocators[0].ranks == allocators[1].ranks != {"0": 4, "2": 4}
    assert (ours(rows()) - other(rows())).abs().max() < 1e-7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_moved_dtype_moves_all_alike(dtype):
    model, base, x = begun("pissa").to(dtype), plain().to(dtype), rows(dtype)
    assert {t.dtype for t in (*model.parameters(), *model.buffers())} == {dtype}
    difference = (model(x).double() - base(x).double()).abs().max()
    assert difference <= 8 * torch.finfo(dtype).eps
    with rw.disable_adapters(model):
        assert_same_bits(model(x), base(x), "disabled")


def test_to_the_meta_device_and_back_by_a_state():
    model, x = trained(begun("pissa")), rows()
    state, wanted = copy.deepcopy(model.state_dict()), model(x)
    model.to("meta").load_state_dict(state, assign=True)
    assert_same_bits(model(x), wanted, "assigned")
    model.to("meta").to_empty(device="cpu").load_state_dict(state)
    assert_same_bits(model(x), wanted, "copied")


def test_a_tied_weight_is_refused_as_for_any_adapter():
    model = llama(tied=True)
    with pytest.raises(ValueError, match="has its weight tied to"):
        rw.apply_lora(model, rw.LoRAConfig(target_modules=["lm_head"]), first_values=rw.PiSSA())


def test_a_resized_head_computes_its_base_in_new_rows():
    torch.manual_seed(2)
    model = llama().eval()
    config = rw.LoRAConfig(rank=2, target_modules=["lm_head", "q_proj"])
    randomise(rw.apply_lora(model, config, first_values=rw.PiSSA()))
    tokens = torch.arange(28).view(4, 7)
    before = model(tokens).logits
    model.resize_token_embeddings(44)
    after = model(tokens).logits
    assert (after[..., :40] - before).abs().max() < 1e-5
    hidden = model.model(tokens).last_hidden_state
    assert (after[..., 40:] - hidden @ model.lm_head.weight[40:].t()).abs().max() < 1e-5


def test_a_reset_layer_has_a_plain_adapter_over_its_new_base():
    model = trained(begun("pissa"))
    model[0].reset_parameters()
    assert model[0].lora_first is None
    x = rows()
    assert_same_bits(model[0](x), nn.functional.linear(x, model[0].weight, model[0].bias), "reset")


def test_optimizers_and_counts_see_the_trained_factors_alone():
    model = begun("pissa")
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {f"{i}.lora_{f}" for i in "02" for f in "AB"}
    summary = rw.summary(model)
    assert [layer.rank for layer in summary.layers] == [4, 4]
    assert summary.trainable == 4 * (20 + 24) + 4 * (24 + 16)
    held = [p for group in rw.parameter_groups(model, lr=0.1) for p in group["params"]]
    assert sum(p.numel() for p in held) == summary.trainable
    loss(model, rows()).backward()
    assert rw.health_check(model).ok


def test_compiled_and_checkpointed():
    model, x = trained(begun("pissa")), rows()
    wanted = model(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert (compiled(x) - wanted).abs().max() < 1e-12
    saved = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    assert_same_bits(saved, wanted, "checkpointed")


def test_an_averaged_copy_has_the_same_first_factors():
    model, x = begun("pissa"), rows()
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(trained(model))
    average.update_parameters(trained(model))
    layer = average.module[0]
    assert torch.equal(layer.lora_first.lora_A, model[0].lora_first.lora_A)
    with rw.disable_adapters(average):
        assert_same_bits(average(x), plain()(x), "disabled")
