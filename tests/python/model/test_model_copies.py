# Whole models copied, pickled, moved and reloaded: with several adapters, merged, with saved heads.
import copy
import io
import pickle

import pytest
import torch
from small_models import adapted, bert_classifier, llama, output, randomise
from tolerances import assert_same_bits
from torch import nn

import rankwise as rw
from rankwise.config import LoRAConfig

STATES = ["plain", "merged", "base", "disabled"]


def model_in(state: str) -> nn.Module:
    """The same model each time: adapter "a" with its own classifier active, "ab" waiting."""
    torch.manual_seed(12)
    model = bert_classifier().eval()
    whole = LoRAConfig(rank=2, target_modules=["query"], modules_to_save=["classifier"])
    rw.apply_lora(model, whole, "a")
    rw.add_adapter(model, "ab", LoRAConfig(rank=3, target_modules=["query", "key"]))
    for seed, name in enumerate(("ab", "a")):
        rw.activate_adapter(model, name)
        randomise(model, seed)
    if state == "merged":
        rw.merge(model)
    if state == "base":
        rw.activate_adapter(model, None)
    if state == "disabled":
        rw.disable_adapters(model).__enter__()
    return model


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("twin_of", [copy.deepcopy, pickled, saved])
def test_a_copy_is_equal_in_every_adapter_and_shares_nothing(state, twin_of):
    model = model_in(state)
    twin = twin_of(model)
    assert_same_bits(output(twin).detach(), output(model).detach(), "output")
    if state == "merged":
        rw.unmerge(model), rw.unmerge(twin)
    assert rw.adapter_names(twin) == rw.adapter_names(model) == ["a", "ab"]
    wanted = {}
    for name in ("ab", None, "a"):
        rw.activate_adapter(model, name), rw.activate_adapter(twin, name)
        wanted[name] = output(model).detach()
        assert_same_bits(output(twin).detach(), wanted[name], f"output of {name}")
        mine = {p.data_ptr() for p in model.parameters()}
        assert mine.isdisjoint(p.data_ptr() for p in twin.parameters())
    with torch.no_grad():
        for name in ("ab", None, "a"):
            rw.activate_adapter(twin, name)
            for parameter in twin.parameters():
                parameter.zero_()
    for name, value in wanted.items():
        rw.activate_adapter(model, name)
        assert_same_bits(output(model).detach(), value, f"{name} after its copy was cleared")


def test_a_copy_of_a_tied_model_is_tied():
    model = rw.apply_lora(llama(tied=True), LoRAConfig(target_modules="all-linear"))
    for twin in (copy.deepcopy(model), pickled(model)):
        assert twin.lm_head.weight is twin.model.embed_tokens.weight


def test_a_change_of_dtype_while_merged_is_that_of_the_unmerged_model():
    model, reference = model_in("merged"), model_in("plain")
    model.double()
    rw.unmerge(model)
    reference.double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    for name in ("ab", None, "a"):
        rw.activate_adapter(model, name), rw.activate_adapter(reference, name)
        assert_same_bits(output(model).detach(), output(reference).detach(), f"output of {name}")


def test_a_states_round_trip_through_torch_save():
    model, file = model_in("plain"), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin = model_in("plain")
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert_same_bits(output(twin).detach(), output(model).detach(), "output")


def test_to_meta_and_back_by_to_empty():
    model = model_in("plain")
    reference, state = output(model).detach(), copy.deepcopy(model.state_dict())
    model.to("meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    model.to_empty(device="cpu")
    model.load_state_dict(state, strict=True)
    model.bert.embeddings.position_ids = torch.arange(16).expand((1, -1))
    model.bert.embeddings.token_type_ids = torch.zeros((1, 16), dtype=torch.long)
    assert_same_bits(output(model).detach(), reference, "output")


def test_sharing_memory_reaches_the_merged_base():
    model = model_in("merged").share_memory()
    rw.unmerge(model)
    assert all(layer.weight.is_shared() for layer in adapted(model).values())
