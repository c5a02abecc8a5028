# AdaLoRA of PEFT models on rankwise's allocator: PEFT's masks, by hand and attached; what is saved.
import copy
import pickle

import peft
import pytest
import torch
from adalora_runs import Schedule, Tower, masks, sigmas, train

import rankwise as rw
import rankwise.integrations.peft as rp

SCHEDULES = {
    "plain": Schedule(),
    "warmup and final": Schedule(tinit=3, tfinal=8),
    "interval": Schedule(deltaT=4, tinit=2, tfinal=5),
    "interval does not divide": Schedule(deltaT=7, tfinal=3),
    "betas": Schedule(beta1=0.5, beta2=0.95),
    "target 0": Schedule(target_r=0, tfinal=4),
}


@pytest.mark.parametrize("first", [0, 1, 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_masks_of_peft(schedule, first):
    stock, ours = SCHEDULES[schedule].model(), SCHEDULES[schedule].model()
    rp.accelerate(ours)
    expected = train(stock, first=first)
    assert train(ours, first=first) == expected
    assert any(not all(mask) for mask in expected[-1])
    for mine, other in zip(sigmas(ours), sigmas(stock), strict=True):
        torch.testing.assert_close(mine, other)


def test_attached_is_as_by_hand():
    by_hand, attached = Schedule(tfinal=5).model(), Schedule(tfinal=5).model()
    for model in (by_hand, attached):
        rp.accelerate(model)
    expected = train(by_hand, first=1)
    allocator = attached.base_model.rankallocator
    assert isinstance(allocator, rw.RankAllocator)
    assert train(attached, attach=True) == expected
    assert allocator.frozen and allocator.steps == 30
    for mine, other in zip(sigmas(attached), sigmas(by_hand), strict=True):
        assert torch.equal(mine, other)


def test_calls_by_hand_do_nothing_when_attached_and_say_so_once():
    model = Schedule().model()
    rp.accelerate(model)
    with pytest.warns(
        UserWarning, match="update_and_allocate: .* calls by hand do nothing"
    ) as told:
        expected = train(model, attach=True, first=1)
    assert len([w for w in told if "update_and_allocate" in str(w.message)]) == 1
    alone = Schedule().model()
    rp.accelerate(alone)
    assert train(alone, attach=True) == expected


def test_the_penalty_of_peft_in_training_alone():
    stock, ours = Schedule().classifier(), Schedule().classifier()
    rp.accelerate(ours)
    batch = dict(input_ids=torch.arange(12).reshape(3, 4), labels=torch.tensor([0, 1, 0]))
    with_penalty = stock.train()(**batch).loss
    torch.testing.assert_close(ours.train()(**batch).loss, with_penalty)
    with_penalty.backward()
    ours(**batch).loss.backward()
    gradients = {n: p.grad for n, p in stock.named_parameters() if p.grad is not None}
    found = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert gradients.keys() == found.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient)
    plain = stock.base_model.model(**batch).loss  # without the tuner there is none
    assert not torch.allclose(stock.eval()(**batch).loss, plain)
    torch.testing.assert_close(ours.eval()(**batch).loss, plain)
    with torch.no_grad():
        torch.testing.assert_close(ours.train()(**batch).loss, plain)


def test_rank_pattern_is_written_once_at_the_end(tmp_path):
    stock, ours = Schedule(tfinal=5).model(), Schedule(tfinal=5).model()
    rp.accelerate(ours)
    config, allocator = ours.peft_config["default"], ours.base_model.rankallocator
    train(stock, first=1)
    train(ours, first=1)
    assert config.rank_pattern is None
    allocator.finish()
    assert config.rank_pattern == stock.peft_config["default"].rank_pattern
    written = config.rank_pattern
    allocator.finish()
    assert config.rank_pattern is written
    assert {
        n: sum(p) for n, p in zip(allocator.ranks, written.values(), strict=True)
    } == allocator.ranks
    expected = ours(torch.ones(2, 8))
    ours.save_pretrained(tmp_path)
    assert torch.equal(ours(torch.ones(2, 8)), expected)
    torch.manual_seed(0)
    read = peft.PeftModel.from_pretrained(Tower(), tmp_path)
    torch.testing.assert_close(read(torch.ones(2, 8)), expected)
    shapes = [layer.lora_A["default"].shape[0] for layer in rp_layers(read)]
    assert shapes == list(allocator.ranks.values())


def rp_layers(model):
    from peft.tuners.adalora import SVDLinear

    return [module for module in model.modules() if isinstance(module, SVDLinear)]


def test_finishing_changes_no_output():
    model = Schedule().model()
    rp.accelerate(model)
    train(model, first=1)
    state = copy.deepcopy(peft.get_peft_model_state_dict(model))
    early = Schedule().model()
    rp.accelerate(early)
    train(early, first=1, steps=6)
    best = peft.get_peft_model_state_dict(early)
    peft.set_peft_model_state_dict(model, best)  # of an earlier step, with more directions
    expected = model(torch.ones(2, 8))
    model.base_model.rankallocator.finish()
    assert torch.equal(model(torch.ones(2, 8)), expected)
    saved = peft.get_peft_model_state_dict(model)
    kept = {n: sum(p) for n, p in model.peft_config["default"].rank_pattern.items()}
    assert sum(kept.values()) > sum(model.base_model.rankallocator.ranks.values())
    assert sum(x.shape[0] for n, x in saved.items() if "lora_E" in n) == sum(kept.values())
    assert state.keys() == saved.keys()


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("way", COPIES)
def test_copies_go_on_by_themselves(way):
    model = Schedule().model()
    rp.accelerate(model)
    train(model, first=1, steps=12)
    copied = COPIES[way](model)
    before = [sigma.clone() for sigma in sigmas(model)]
    rest = train(copied, first=13, steps=18)
    for sigma, old in zip(sigmas(model), before, strict=True):
        assert torch.equal(sigma, old)
    assert train(model, first=13, steps=18) == rest


@pytest.mark.parametrize("at", [1, 12, 27])
def test_accelerated_in_the_middle_of_a_training(at, tmp_path):
    stock, ours = Schedule(tfinal=5).model(), Schedule(tfinal=5).model()
    train(stock, first=1, steps=at)
    train(ours, first=1, steps=at)
    rp.accelerate(ours)
    assert ours.peft_config["default"].rank_pattern is None
    expected = train(stock, first=at + 1, steps=30 - at)
    assert train(ours, first=at + 1, steps=30 - at) == expected
    ours.base_model.rankallocator.finish()
    assert sum(map(sum, ours.peft_config["default"].rank_pattern.values())) == 4


def test_a_trimmed_folder_of_pefts_in_mid_schedule(tmp_path):
    stock = Schedule(tfinal=5).model()
    train(stock, first=1, steps=8)
    stock.save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = peft.PeftModel.from_pretrained(Tower(), tmp_path, is_trainable=True)
    rp.accelerate(model)
    assert 4 < sum(model.base_model.rankallocator.ranks.values()) < 12
    expected = model(torch.ones(2, 8))
    train(model, first=9, steps=22)
    assert sum(model.base_model.rankallocator.ranks.values()) == 4
    model.base_model.rankallocator.finish()
    expected = model(torch.ones(2, 8))
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    read = peft.PeftModel.from_pretrained(Tower(), tmp_path)
    torch.testing.assert_close(read(torch.ones(2, 8)), expected)


def test_a_folder_of_which_nothing_was_kept(tmp_path):
    source = Schedule(target_r=0, tfinal=5).model()
    rp.accelerate(source)
    train(source, first=1)
    source.base_model.rankallocator.finish()
    source.save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = peft.PeftModel.from_pretrained(Tower(), tmp_path, is_trainable=True)
    report = rp.accelerate(model)
    assert report.allocator is None
    torch.testing.assert_close(model(torch.ones(2, 8)), source(torch.ones(2, 8)))
    model.base_model.update_and_allocate(3)


def test_compiled_whole():
    model = Schedule().model()
    rp.accelerate(model)
    train(model, first=1, steps=5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(torch.ones(2, 8)), model(torch.ones(2, 8)))


def test_restore_gives_pefts_allocator_back():
    model = Schedule().model()
    theirs = model.base_model.rankallocator
    report = rp.accelerate(model)
    assert report.allocator is model.base_model.rankallocator is not theirs
    first = model.base_model.rankallocator
    rp.accelerate(model)
    assert model.base_model.rankallocator is first
    rp.restore(model)
    assert model.base_model.rankallocator is theirs
    assert type(model.base_model) is peft.tuners.AdaLoraModel


def test_several_adapters_one_of_which_trains(tmp_path):
    Schedule(seed=5).model().save_pretrained(tmp_path)
    model = Schedule().model()
    rp.accelerate(model)
    model.load_adapter(tmp_path, "frozen")
    masked = train(model, first=1)
    assert any(not all(mask) for mask in masked[-1])
    assert set(model.base_model.rankallocator.ranks) == {"first", "second"}


def test_inference_has_no_allocator(tmp_path):
    Schedule().model().save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(Tower(), tmp_path)
    report = rp.accelerate(model)
    assert report.allocator is None and len(report.taken) == 2
    model(torch.ones(2, 8))


def test_parameters_of_another_device_type_or_object():
    model = Schedule().model()
    rp.accelerate(model)
    train(model, first=1, steps=5)
    model.double()
    for layer in rp_layers(model):
        layer.lora_E["default"] = torch.nn.Parameter(layer.lora_E["default"].detach().clone())
    found = masks(model)
    assert train(model, first=6, dtype=torch.float64)[-1] != found
