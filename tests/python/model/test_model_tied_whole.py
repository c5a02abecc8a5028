# Tied ends among modules_to_save: both train one copy; an embedding alone trains apart.
import copy
import pickle

import peft
import pytest
import torch
from small_models import assert_base_bits, gpt2, llama, loss, output, randomise, t5
from tolerances import assert_same_bits

import rankwise as rw
from rankwise.config import LoRAConfig

ENDS = {
    "llama": (lambda: llama(tied=True), ["q_proj"], "model.embed_tokens", "lm_head"),
    "gpt2": (gpt2, ["c_attn"], "transformer.wte", "lm_head"),
}


def built(build):
    torch.manual_seed(0)
    return build().double().eval()


def trained(model, steps=3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    return model


def made(name, *ends):
    """(plain model, the model with these of its ends trained whole, names of both ends)"""
    build, targets, *names = ENDS[name]
    whole = [names[("table", "head").index(end)] for end in ends]
    config = LoRAConfig(rank=2, target_modules=targets, modules_to_save=whole)
    return built(build), rw.apply_lora(built(build), config), *names


@pytest.fixture(params=ENDS)
def both(request):
    return made(request.param, "table", "head")


@pytest.fixture(params=ENDS)
def alone(request):
    return made(request.param, "table")


@pytest.fixture(params=[(name, *ends) for name in ENDS for ends in (["table"], ["table", "head"])])
def case(request):
    return made(*request.param)


def weight(model, name):
    return model.get_submodule(name).weight


def test_both_ends_train_one_parameter_and_the_base_comes_back(both):
    plain, model, table, head = both
    assert weight(model, table) is weight(model, head)
    trained(model)
    assert rw.health_check(model).ok
    assert weight(model, table) is weight(model, head)
    assert not torch.equal(weight(model, table), weight(plain, table))
    wanted = output(model).detach()
    with rw.disable_adapters(model):
        assert weight(model, table) is weight(model, head)
        assert_same_bits(output(model).detach(), output(plain).detach(), "the base's output")
    assert_same_bits(output(model).detach(), wanted, "output")
    rw.activate_adapter(model, None)
    assert_base_bits(model, plain.state_dict())


def test_an_embedding_alone_trains_apart_from_the_head(alone):
    plain, model, table, head = alone
    trained(model)
    assert rw.health_check(model).ok
    assert_same_bits(weight(model, head).detach(), weight(plain, head).detach(), "head")
    assert not torch.equal(weight(model, table), weight(plain, table))
    rw.activate_adapter(model, None)
    assert weight(model, table) is weight(model, head)
    assert_base_bits(model, plain.state_dict())


def test_peft_computes_what_was_trained_and_the_reverse(case, tmp_path):
    plain, model, *_ = case
    rw.save_adapter(trained(model), tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path, is_trainable=True)
    torch.testing.assert_close(output(theirs), output(model), rtol=0, atol=1e-12)
    trained(theirs).save_pretrained(tmp_path / "theirs")  # the ends part in PEFT
    again = copy.deepcopy(plain)
    rw.load_adapter(again, tmp_path / "theirs")
    torch.testing.assert_close(output(again), output(theirs), rtol=0, atol=1e-12)
    rw.load_adapter(again, tmp_path, name="first")
    assert_same_bits(output(again).detach(), output(model).detach(), "output of our folder")


def test_our_own_folder_ties_the_ends_again(both, tmp_path):
    plain, model, table, head = both
    rw.save_adapter(trained(model), tmp_path)
    rw.load_adapter(plain, tmp_path)
    assert weight(plain, table) is weight(plain, head)
    assert weight(plain, table).requires_grad


def test_ends_that_differ_do_not_go_into_a_tied_copy(both, tmp_path):
    plain, model, table, head = both
    config = peft.LoraConfig(
        r=2, lora_alpha=16, target_modules=["c_attn" if "wte" in table else "q_proj"],
        modules_to_save=[table, head], fan_in_fan_out="wte" in table,
    )  # fmt: skip
    theirs = randomise(peft.get_peft_model(plain, config).eval())
    theirs.save_pretrained(tmp_path)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(rw.FileError, match="differs from .*, to which it is tied in the model"):
        rw.load_adapter(model, tmp_path)
    assert_base_bits(model, before)
    rw.load_adapter(model, tmp_path, name="theirs")
    torch.testing.assert_close(output(model), output(theirs), rtol=0, atol=1e-12)


def test_each_adapter_has_its_own_ends(case):
    plain, model, table, head = case
    config = LoRAConfig(rank=2, target_modules="all-linear", modules_to_save=[table])
    rw.add_adapter(model, "alone", config)
    rw.add_adapter(model, "none", LoRAConfig(rank=2, target_modules="all-linear"))
    names, wanted = rw.adapter_names(model), {}
    for name in names:
        rw.activate_adapter(model, name)
        assert_same_bits(weight(model, table).detach(), weight(plain, table).detach(), name)
        wanted[name] = output(randomise(model)).detach()
    for name in (*reversed(names), *names):
        rw.activate_adapter(model, name)
        assert_same_bits(output(model).detach(), wanted[name], name)
    for name in names:
        rw.delete_adapter(model, name)
    assert_base_bits(model, plain.state_dict())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_the_same_ties(case, duplicate):
    plain, model, table, head = case
    twin = duplicate(trained(model))
    assert_same_bits(output(twin).detach(), output(model).detach(), "output")
    tied = weight(model, table) is weight(model, head)
    assert (weight(twin, table) is weight(twin, head)) == tied
    rw.activate_adapter(twin, None)
    assert weight(twin, table) is weight(twin, head)
    assert_base_bits(twin, plain.state_dict())


def test_merged_and_moved_models(case):
    plain, model, table, head = case
    wanted = output(trained(model)).detach()
    rw.merge(model)
    torch.testing.assert_close(output(model), wanted, rtol=0, atol=1e-12)
    with rw.disable_adapters(model):
        assert_same_bits(output(model).detach(), output(plain).detach(), "the base's output")
    rw.unmerge(model)
    assert_same_bits(output(model).detach(), wanted, "output")
    model.float()
    for name in (None, "default", None):
        rw.activate_adapter(model, name)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        output(model)
    assert_base_bits(model, {k: v.float() for k, v in plain.state_dict().items()})


def test_tie_weights_afterwards_changes_nothing_where_both_ends_train(both, tmp_path):
    _, model, *_ = both
    wanted = output(trained(model)).detach()
    model.tie_weights()
    assert_same_bits(output(model).detach(), wanted, "output")
    rw.save_adapter(model, tmp_path)


def test_tie_weights_afterwards_is_told_and_put_right(alone, tmp_path):
    plain, model, table, head = alone
    wanted = output(trained(model)).detach()
    model.tie_weights()
    found = rf"{head}.weight: tied to {table}.weight since"
    with pytest.raises(ValueError, match=found):
        rw.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=found):
        rw.export_lora(model, tmp_path)
    assert any(head in p and "tied to" in p for p in rw.health_check(model).problems)
    rw.activate_adapter(model, "default")
    assert_same_bits(output(model).detach(), wanted, "output")
    model.tie_weights()
    rw.activate_adapter(model, None)
    assert_base_bits(model, plain.state_dict())


def test_tables_of_t5_train_together():
    plain = built(t5)
    names = ["shared", "embed_tokens", "lm_head"]
    model = built(t5)
    rw.apply_lora(model, LoRAConfig(rank=2, target_modules=["q"], modules_to_save=names))
    assert model.shared.weight is model.decoder.embed_tokens.weight
    trained(model)
    rw.activate_adapter(model, None)
    assert_base_bits(model, plain.state_dict())


@pytest.mark.parametrize("end", ["lm_head", "decoder.embed_tokens"])
def test_an_end_that_does_not_own_the_weight_is_refused(end):
    config = LoRAConfig(rank=2, target_modules=["q"], modules_to_save=[end])
    with pytest.raises(ValueError, match="has its weight tied to 'shared'"):
        rw.apply_lora(built(t5), config)
