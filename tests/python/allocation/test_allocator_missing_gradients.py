# Adapters without gradients: their averages stay, one warning each; none at all is an error.
import re
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from allocation_models import LETTERS, bench, loss_of, network, normal, trained

import rankwise as rw

WORDS = "no gradient in step"


def recorded(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught]


def ready(count: int = 3, **options):
    b = bench([(3, 4), (5, 2), (4, 4)][:count], [4, 3, 4][:count], target_rank=1, **options)
    return b, b.oracle(), normal(6)


def fill(b, random, without=()) -> None:
    b.fill(random, gradients=False)
    b.fill(random, gradients=True)
    for layer, letter in without:
        getattr(b.layers[layer], LETTERS[letter]).grad = None


def averages(b, prefix: str) -> dict[str, torch.Tensor]:
    state = b.allocator.state_dict()
    return {k: v for k, v in state.items() if k.startswith(prefix) and "kept" not in k}


def test_a_module_without_gradients_keeps_its_averages_and_is_named_once():
    b, oracle, random = ready(total_steps=14)
    all_of_1 = [(1, k) for k in LETTERS]
    messages = []
    for step in range(1, 15):
        fill(b, random, all_of_1 if step in (2, 5, 6, 14) else ())
        before = averages(b, "1.")
        oracle.step(b.numpy(False), b.numpy(True))
        messages += recorded(lambda: b.allocator.step(None))
        if step in (2, 5, 6):
            after = averages(b, "1.")
            assert len(after) == 6 and all(torch.equal(after[k], before[k]) for k in before)
        if step < 14:
            torch.testing.assert_close(
                b.allocator.scores, torch.from_numpy(oracle.scores()), rtol=1e-12, atol=0
            )
    got = torch.cat(list(b.allocator.pattern.values()))
    assert got.tolist() == oracle.kept.tolist()
    assert len(messages) == 1 and "'1'" in messages[0] and f"{WORDS} 2" in messages[0]
    assert "'0'" not in messages[0] and "'2'" not in messages[0]


def test_two_modules_are_two_names_once_each():
    b, _, random = ready(total_steps=9)
    missing = {1: [0], 2: [0, 2], 3: [2], 4: [0, 2]}
    messages = []
    for step in range(1, 6):
        fill(b, random, [(m, k) for m in missing.get(step, ()) for k in LETTERS])
        messages += recorded(lambda: b.allocator.step(None))
    assert len(messages) == 2
    assert "'0'" in messages[0] and "'2'" not in messages[0]
    assert "'2'" in messages[1] and "'0'" not in messages[1]


def test_berts_unused_pooler_is_named_once_and_pruned_first():
    """'dense' means the pooler too, which takes no part: PEFT stops with a TypeError."""
    sizes = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=20, **sizes))
    config = rw.AdaLoRAConfig(
        initial_rank=4, target_rank=2, total_steps=6, target_modules=["dense"]
    )
    allocator = rw.RankAllocator(rw.apply_lora(model, config), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    allocator.attach(optimizer)

    def train():
        for _ in range(6):
            model(torch.arange(10)[None]).last_hidden_state[..., 0].square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    messages = recorded(train)
    assert len(messages) == 1 and "'pooler.dense'" in messages[0] and f"{WORDS} 1" in messages[0]
    ranks = allocator.ranks
    assert len(ranks) == 7 and ranks["pooler.dense"] == 0 and sum(ranks.values()) == 14


@pytest.mark.parametrize("letter", LETTERS)
def test_one_factor_without_gradient(letter):
    """That factor's averages stay; each of the other's follow their own gradients."""
    b, oracle, random = ready(total_steps=9)
    messages = []
    for step in range(1, 7):
        fill(b, random, [(1, letter)] if step in (3, 4) else ())
        before = averages(b, f"1.{LETTERS[letter]}")
        oracle.step(b.numpy(False), b.numpy(True))
        messages += recorded(lambda: b.allocator.step(None))
        after = averages(b, f"1.{LETTERS[letter]}")
        changed = [not torch.equal(after[k], before[k]) for k in before]
        assert changed == [step not in (3, 4)] * 2
        torch.testing.assert_close(
            b.allocator.scores, torch.from_numpy(oracle.scores()), rtol=1e-12, atol=0
        )
    assert len(messages) == 1 and "'1'" in messages[0]


def test_a_bad_step_without_some_gradients_is_still_skipped():
    b, _, random = ready(total_steps=9)
    fill(b, random, [(0, "A"), (1, "B")])
    b.layers[2].lora_A.grad[0, 0] = float("nan")
    assert len(recorded(lambda: b.allocator.step(None))) == 1
    assert b.allocator.skipped_steps == 1 and b.allocator.steps == 0
    assert not any(average.any() for average in averages(b, "").values() if average.dim() == 2)


def test_no_gradients_at_all_is_an_error_that_says_what_to_do():
    model, allocator = network(total_steps=6)
    optimizer = torch.optim.SGD(trained(model), 0.1)
    loss_of(model, 1).backward()
    optimizer.step()
    optimizer.zero_grad()
    before = allocator.state_dict()
    with pytest.raises(RuntimeError, match=re.escape("attach(optimizer)")):
        allocator.step(optimizer)
    assert all(torch.equal(v, before[k]) for k, v in allocator.state_dict().items())


def test_no_gradients_at_all_from_the_hook():
    model, allocator = network(total_steps=6)
    optimizer = torch.optim.SGD(trained(model), 0.1)
    optimizer.register_step_post_hook(lambda *_: optimizer.zero_grad())  # before the allocator's
    allocator.attach(optimizer)
    loss_of(model, 1).backward()
    with pytest.raises(RuntimeError, match="no adapter has a gradient.*before.*zero_grad"):
        optimizer.step()


def test_gradients_cleared_to_zeros_warn_once():
    model, allocator = network(total_steps=9)
    optimizer = torch.optim.SGD(trained(model), 0.1)
    optimizer.register_step_post_hook(lambda *_: optimizer.zero_grad(set_to_none=False))
    allocator.attach(optimizer)
    messages = []
    for step in range(1, 5):
        loss_of(model, step).backward()
        messages += recorded(optimizer.step)
    assert len(messages) == 1 and "all gradients are zero" in messages[0]


def test_ordinary_training_warns_of_nothing():
    model, allocator = network(total_steps=9, final_steps=2)
    optimizer = torch.optim.AdamW(trained(model), 0.1)
    allocator.attach(optimizer)
    for step in range(1, 12):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        assert recorded(optimizer.step) == []


WARNS_AND_FAILS = """
import torch, rankwise as rw
model = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
config = rw.AdaLoRAConfig(target_modules=["0", "1"], initial_rank=2, target_rank=1, total_steps=2)
model = rw.apply_lora(model, config)
allocator = rw.RankAllocator(model, config)
for factor in (model[0].lora_A, model[0].lora_B, model[0].lora_E, model[1].lora_B):
    factor.grad = torch.ones_like(factor)  # layer 1 lacks two: a warning
model[0].lora_A.data = model[0].lora_A.data.t()  # no longer contiguous: an exception
try:
    allocator.step(None)
except (RuntimeError, UserWarning) as error:
    print("raised", error)
"""


def test_a_warning_made_an_error_does_not_end_the_process():
    """A step that warns and then fails raises an exception, whatever the warning filter."""
    command = [sys.executable, "-W", "error::UserWarning", "-c", WARNS_AND_FAILS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "raised" in done.stdout, done.stderr[-2000:]
