# merge(model), unmerge(model): all layers or none, plain checkpoints while merged, the base back.
import copy

import pytest
import torch
import transformers
from small_models import (
    BUILDERS,
    adapted,
    assert_unchanged,
    bert,
    bert_classifier,
    deltas,
    fingerprint,
    llama,
    output,
    randomise,
)
from tolerances import assert_same_bits

import rankwise as rw
from rankwise.config import LoRAConfig

CONFIG = LoRAConfig(rank=2, target_modules=["query", "dense", "word_embeddings"])


@pytest.mark.parametrize("architecture", BUILDERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_merge_and_unmerge_leave_no_trace(architecture, dtype):
    model = BUILDERS[architecture]().to(dtype).eval()
    rw.apply_lora(model, LoRAConfig(rank=2, target_modules="all-linear"))
    randomise(model)
    wanted, before = output(model).detach(), fingerprint(model)
    sums = {n: adapted(model)[n].weight.double() + d for n, d in deltas(model).items()}
    reports = rw.merge(model)
    assert set(reports) == set(adapted(model))
    for name, report in reports.items():
        layer = adapted(model)[name]
        assert report.total == layer.weight.numel()
        error = (layer.weight.double() - sums[name]).abs().max().item()
        assert report.max_rounding_error == pytest.approx(error, rel=1e-6, abs=1e-15)
    if dtype == torch.float64:
        torch.testing.assert_close(output(model), wanted, rtol=1e-9, atol=1e-10)
    rw.unmerge(model)
    assert_unchanged(model, before)
    assert_same_bits(output(model).detach(), wanted, "output")


def test_a_merged_models_state_is_the_plain_models(tmp_path):
    plain = bert_classifier().eval()
    config = LoRAConfig(rank=2, target_modules=["query"], modules_to_save=["classifier"])
    model = randomise(rw.apply_lora(copy.deepcopy(plain), config))
    rw.add_adapter(model, "other", CONFIG)
    rw.merge(model)
    wanted = output(model).detach()
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict(), strict=True)
    assert_same_bits(output(plain).detach(), wanted, "the plain model's output")
    model.save_pretrained(tmp_path)
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert_same_bits(output(loaded).detach(), wanted, "output from the checkpoint")


@pytest.mark.parametrize("bad", [0, 3, -1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_all_or_none(bad, value):
    model = randomise(rw.apply_lora(bert(), CONFIG))
    name, layer = list(adapted(model).items())[bad]
    with torch.no_grad():
        layer.lora_B[0, 0] = value
    before = fingerprint(model)
    with pytest.raises(RuntimeError, match=f"{name}: merge: .* not be finite"):
        rw.merge(model)
    assert_unchanged(model, before)
    assert not any(layer.merged for layer in adapted(model).values())


def test_all_or_none_keeps_layers_merged_by_hand():
    model = randomise(rw.apply_lora(bert(), CONFIG))
    layers = list(adapted(model).values())
    layers[0].merge()
    with torch.no_grad():
        layers[-1].lora_A[0, 0] = float("nan")
    before = fingerprint(model)
    with pytest.raises(RuntimeError, match="not be finite"):
        rw.merge(model)
    assert [layer.merged for layer in layers] == [True] + [False] * (len(layers) - 1)
    assert_unchanged(model, before)


def test_merging_twice_and_unmerging_twice_warn_and_do_nothing():
    model = randomise(rw.apply_lora(bert(), CONFIG))
    with pytest.warns(UserWarning, match="unmerge: .*not merged"):
        rw.unmerge(model)
    rw.merge(model)
    before = fingerprint(model)
    with pytest.warns(UserWarning, match="merge: .*merged already"):
        rw.merge(model)
    assert_unchanged(model, before)
    rw.unmerge(model)


def test_without_an_active_adapter_there_is_nothing_to_merge():
    model = rw.apply_lora(bert(), CONFIG)
    rw.activate_adapter(model, None)
    with pytest.raises(RuntimeError, match="merge: no adapter is active"):
        rw.merge(model)


def test_a_merged_model_refuses_to_switch_and_to_lose_its_adapter():
    model = randomise(rw.apply_lora(bert_classifier(), CONFIG))
    rw.add_adapter(model, "other", LoRAConfig(target_modules=["key"]))
    rw.merge(model)
    before = fingerprint(model)
    for call in (
        lambda: rw.activate_adapter(model, "other"),
        lambda: rw.activate_adapter(model, None),
        lambda: rw.delete_adapter(model, "default"),
    ):
        with pytest.raises(RuntimeError, match=r"the model is merged; call unmerge\(model\) first"):
            call()
        assert_unchanged(model, before)
        assert rw.adapter_names(model) == ["default", "other"]
    rw.delete_adapter(model, "other")
    rw.unmerge(model)
    output(model).sum().backward()


def test_an_adapter_added_while_merged_waits_and_works_after():
    plain = bert()
    model = randomise(rw.apply_lora(copy.deepcopy(plain).eval(), CONFIG))
    wanted = output(model).detach()
    rw.merge(model)
    rw.add_adapter(model, "other", LoRAConfig(rank=2, target_modules=["query", "key"]))
    assert list(model.state_dict()) == list(plain.state_dict())  # also of layers adapted just now
    torch.testing.assert_close(output(model), wanted, rtol=1e-4, atol=1e-5)
    rw.unmerge(model)
    assert_same_bits(output(model).detach(), wanted, "output")
    rw.activate_adapter(model, "other")


def test_training_a_merged_model_raises_and_evaluating_does_not():
    model = randomise(rw.apply_lora(bert(), CONFIG))
    rw.merge(model)
    with pytest.raises(RuntimeError, match="a merged layer would train nothing"):
        output(model.train())
    output(model.eval())


def test_loading_into_a_merged_model_is_refused_by_layer():
    plain = bert()
    model = randomise(rw.apply_lora(copy.deepcopy(plain), CONFIG))
    rw.merge(model)
    with pytest.raises(RuntimeError, match=r"encoder.layer.0.attention.self.query: a merged layer"):
        model.load_state_dict(plain.state_dict())


def test_tied_weights_stay_tied_and_untouched():
    model = llama(tied=True).eval()
    rw.apply_lora(model, LoRAConfig(rank=2, target_modules="all-linear"))
    randomise(model)
    shared = model.model.embed_tokens.weight
    bits = shared.detach().clone()
    rw.merge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight is shared
    assert_same_bits(shared, bits, "shared table")
    rw.unmerge(model)
    assert model.lm_head.weight is shared


def test_only_the_active_adapter_is_merged():
    plain = bert().double().eval()
    model = randomise(rw.apply_lora(copy.deepcopy(plain), CONFIG))
    rw.add_adapter(model, "other", LoRAConfig(rank=3, target_modules=["value"]))
    rw.activate_adapter(model, "other")
    randomise(model, seed=4)
    assert {name.split(".")[-1] for name in rw.merge(model)} == {"value"}
    state = model.state_dict()
    changed = {n for n, v in plain.state_dict().items() if not torch.equal(state[n], v)}
    assert changed == {f"encoder.layer.{i}.attention.self.value.weight" for i in (0, 1)}
