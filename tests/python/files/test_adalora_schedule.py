"""AdaLoRA's schedule in folders: stored where it is known, had again, and continued by PEFT."""

import copy
import json
import pickle

import peft
import pytest
import torch
from file_models import bert, layers_of, output, prune, randomise
from safetensors.torch import load_file, save_file
from torch import nn

import rankwise as rw

CONFIG = rw.AdaLoRAConfig(
    initial_rank=4,
    target_rank=2,
    alpha=10.0,
    dropout=0.1,
    total_steps=90,
    warmup_steps=10,
    final_steps=20,
    allocation_interval=5,
    beta1=0.5,
    beta2=0.75,
    budget_unit="parameters",
    min_rank=1,
    shrink=False,
    target_modules=["key", "query"],
    modules_to_save=["embeddings.LayerNorm"],
)
IN_THE_FILE = {
    "init_r": 4,
    "target_r": 2,
    "total_step": 90,
    "tinit": 10,
    "tfinal": 20,
    "deltaT": 5,
    "beta1": 0.5,
    "beta2": 0.75,
    "orth_reg_weight": 0.5,
}


def file_config(folder) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def edit(folder, **fields) -> None:
    """As another program might have written it: without checksums."""
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path, {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(file_config(folder) | fields))


def test_a_folder_gives_the_same_configuration_again(tmp_path):
    model = rw.apply_lora(bert(), CONFIG)
    assert rw.adalora_config(model) == CONFIG
    prune(next(iter(layers_of(model).values())), 1)
    rw.save_adapter(model, tmp_path)
    stored = file_config(tmp_path)
    assert {name: stored[name] for name in IN_THE_FILE} == IN_THE_FILE
    theirs = peft.PeftConfig.from_pretrained(tmp_path).to_dict()
    assert stored.keys() <= theirs.keys() and stored["total_step"] == theirs["total_step"]
    loaded = bert()
    rw.load_adapter(loaded, tmp_path)
    rw.load_adapter(loaded, tmp_path, name="copy")
    assert rw.adalora_config(loaded) == rw.adalora_config(loaded, "default") == CONFIG
    for model in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert rw.adalora_config(model) == CONFIG


def test_patterns_are_in_the_configuration_as_far_as_ranks_differ():
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    config = rw.AdaLoRAConfig(
        initial_rank=6, total_steps=9, target_rank=5, target_modules=["0", "1.0", "1.1"],
        rank_pattern={"1.0": 2, "1.1": 2}, alpha_pattern={"1.1": 5.0},
    )  # fmt: skip
    rw.apply_lora(model, config)
    again = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    rw.apply_lora(again, rw.adalora_config(model))
    for layer, other in zip(layers_of(model).values(), layers_of(again).values(), strict=True):
        assert layer.options == other.options


def test_the_last_allocators_schedule_counts(tmp_path):
    """Also over layers that were put there by hand, and on after a load."""
    model = nn.Sequential(rw.nn.AdaLoRALinear(8, 8, rank=4, alpha=10.0))
    with pytest.raises(ValueError, match="have no schedule in common.*with an AdaLoRAConfig"):
        rw.adalora_config(model)
    rw.save_adapter(model, tmp_path)
    stored = file_config(tmp_path)
    assert (stored["target_r"], stored["total_step"], stored["tinit"]) == (4, 1, 0)
    loaded = nn.Sequential(nn.Linear(8, 8))
    rw.load_adapter(loaded, tmp_path)
    with pytest.raises(ValueError, match="have no schedule in common"):
        rw.adalora_config(loaded)

    rw.RankAllocator(model, CONFIG)
    rw.save_adapter(model, tmp_path)
    rw.load_adapter(loaded, tmp_path)  # knows none: takes the file's
    assert loaded[0].options.allocation == CONFIG.allocation_settings()
    other = rw.AdaLoRAConfig(total_steps=7, initial_rank=4, target_rank=3, target_modules=["0"])
    rw.RankAllocator(loaded, other)
    rw.load_adapter(loaded, tmp_path)
    assert rw.adalora_config(loaded).total_steps == 7


def train(model, optimizer, steps, after) -> None:
    for step in steps:
        torch.manual_seed(step)
        model(torch.randint(50, (2, 7)))[0].square().mean().backward()
        optimizer.step()
        after(step)
        optimizer.zero_grad()


def test_training_goes_on_from_a_folder_with_the_same_bits(tmp_path):
    config = rw.AdaLoRAConfig(
        initial_rank=4, target_rank=1, total_steps=12, final_steps=2, target_modules=["query"]
    )

    def run(model, allocator, optimizer, steps):
        handle = allocator.attach(optimizer)
        train(model, optimizer, steps, lambda step: None)
        handle.remove()

    def optimizer_of(model):
        parameters = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.AdamW(parameters, lr=1e-2)

    model = rw.apply_lora(bert(), config)
    randomise(model)
    allocator, optimizer = rw.RankAllocator(model, config), optimizer_of(model)
    run(model, allocator, optimizer, range(6))
    rw.save_adapter(model, tmp_path)
    loaded = bert()
    rw.load_adapter(loaded, tmp_path)
    resumed, their = rw.RankAllocator(loaded, rw.adalora_config(loaded)), optimizer_of(loaded)
    resumed.load_state_dict(allocator.state_dict())
    their.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(model, allocator, optimizer, range(6, 12))
    run(loaded, resumed, their, range(6, 12))
    assert resumed.ranks == allocator.ranks and sum(resumed.ranks.values()) == 2
    assert torch.equal(output(loaded), output(model))


def test_peft_computes_the_same_before_during_and_after_pruning(tmp_path):
    config = rw.AdaLoRAConfig(
        initial_rank=4, target_rank=1, alpha=8.0, total_steps=12, final_steps=2,
        target_modules=["query", "value"],
    )  # fmt: skip
    model = rw.apply_lora(bert().double(), config)
    randomise(model, std=0.4)
    allocator = rw.RankAllocator(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    allocator.attach(optimizer)
    kept = []
    for start in (0, 1, 4, 11, 12):
        rw.save_adapter(model.eval(), tmp_path / f"{start}")
        theirs = peft.PeftModel.from_pretrained(bert().double(), tmp_path / f"{start}").eval()
        torch.testing.assert_close(output(theirs), output(model), rtol=0, atol=1e-11)
        theirs.save_pretrained(tmp_path / "theirs")
        back = bert().double()
        rw.load_adapter(back, tmp_path / "theirs")
        torch.testing.assert_close(output(back.eval()), output(model), rtol=0, atol=1e-11)
        kept.append(sum(allocator.ranks.values()))
        train(model, optimizer, range(start, {0: 1, 1: 4, 4: 11}.get(start, 12)), lambda step: None)
    assert kept[0] == 16 > kept[1] > kept[2] > kept[3] == kept[4] == 4
    assert 0 in allocator.ranks.values() and 0 in [x.rank for x in layers_of(model).values()]


@pytest.mark.parametrize("pruned", [False, True])
def test_peft_goes_on_with_the_schedule(tmp_path, pruned):
    """A pruned folder only trains on: PEFT's allocator cannot take one, its own neither."""
    config = rw.AdaLoRAConfig(
        initial_rank=4, target_rank=1, alpha=8.0, total_steps=20, warmup_steps=3, final_steps=4,
        target_modules=["query"],
    )  # fmt: skip
    model = rw.apply_lora(bert(), config)
    randomise(model)
    for layer in layers_of(model).values() if pruned else ():
        prune(layer, 1)
    rw.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(bert(), tmp_path, is_trainable=True)
    before = output(theirs.eval())
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2)
    allocate = (lambda step: None) if pruned else theirs.base_model.update_and_allocate
    train(theirs.train(), optimizer, range(5, 17), allocate)
    assert not torch.equal(output(theirs.eval()), before)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = bert()
    rw.load_adapter(ours, tmp_path / "theirs")
    assert sum(layer.rank for layer in layers_of(ours).values()) == 2
    again = rw.adalora_config(ours)
    assert again.total_steps == 20 and again.final_steps == 4 and again.target_rank == 1


def test_pefts_schedule_is_kept(tmp_path):
    schedule = IN_THE_FILE | {"orth_reg_weight": 0.25}
    options = peft.AdaLoraConfig(target_modules=["query"], **schedule)
    peft.get_peft_model(bert(), options).save_pretrained(tmp_path / "theirs")
    ours = bert()
    rw.load_adapter(ours, tmp_path / "theirs")
    config = rw.adalora_config(ours)
    assert (config.beta1, config.allocation_interval) == (0.5, 5)
    assert (config.budget_unit, config.min_rank, config.shrink) == ("triplets", 0, True)
    rw.save_adapter(ours, tmp_path / "ours")
    stored = file_config(tmp_path / "ours")
    assert {name: stored[name] for name in schedule} == schedule


ODD = {
    "target above initial": ({"target_r": 9}, "target_rank must be from 0 to initial_rank 4"),
    "no interval": ({"deltaT": 0}, "allocation_interval must be at least 1, got 0"),
    "beta": ({"beta1": 1.0}, r"beta1 must be in \[0, 1\), got 1"),
    "negative": ({"tinit": -5}, "warmup_steps must be at least 0, got -5"),
}


@pytest.mark.parametrize("fields, message", ODD.values(), ids=ODD)
def test_an_odd_schedule_loads_and_is_refused_where_it_is_wanted(tmp_path, fields, message):
    model = rw.apply_lora(bert(), CONFIG)
    randomise(model)
    rw.save_adapter(model, tmp_path)
    edit(tmp_path, **fields)
    loaded = bert()
    rw.load_adapter(loaded, tmp_path)
    assert torch.equal(output(loaded.eval()), output(model.eval()))
    with pytest.raises(ValueError, match=message):
        rw.adalora_config(loaded)
    rw.save_adapter(loaded, tmp_path)
    assert fields.items() <= file_config(tmp_path).items()
    theirs = peft.PeftModel.from_pretrained(bert(), tmp_path).eval()
    torch.testing.assert_close(output(theirs), output(loaded), rtol=0, atol=2e-5)


NONE = {
    "older PEFT's": {"total_step": None},
    "no room to prune": {"tinit": 70},
    "text": {"deltaT": "often"},
    "half a step": {"tfinal": 2.5},
}


@pytest.mark.parametrize("fields", NONE.values(), ids=NONE)
def test_a_schedule_that_peft_refuses_is_none(tmp_path, fields):
    model = rw.apply_lora(bert(), CONFIG)
    randomise(model)
    rw.save_adapter(model, tmp_path)
    edit(tmp_path, **fields)
    loaded = bert()
    rw.load_adapter(loaded, tmp_path)
    assert torch.equal(output(loaded.eval()), output(model.eval()))
    with pytest.raises(ValueError, match="have no schedule in common"):
        rw.adalora_config(loaded)
    rw.save_adapter(loaded, tmp_path)
    peft.PeftModel.from_pretrained(bert(), tmp_path)


def test_of_no_adalora_adapter():
    model = rw.apply_lora(bert(), rw.LoRAConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="0.attention.self.query must have an AdaLoRA adapter"):
        rw.adalora_config(model)
    with pytest.raises(ValueError, match=r"adalora_config: adapters are \['default'\], got 'x'"):
        rw.adalora_config(model, "x")
