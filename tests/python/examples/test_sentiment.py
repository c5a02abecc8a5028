# The demo's pieces on a few hundred snippets: data, batches, training, promises, figure.
import copy
import io
import re
import sys
import warnings

import demo
import promises
import pytest
import snippets
import torch
import training
import typer
from batches import TokenizedSnippets
from classifier import load_encoder, load_tokenizer, predict

import rankwise as rw

TRAIN, TEST = 320, 64


@pytest.fixture(scope="module")
def data():
    """Training and test set."""
    train, test = snippets.split(snippets.load_snippets())
    tokenizer = load_tokenizer()
    return TokenizedSnippets(train[:TRAIN], tokenizer), TokenizedSnippets(test[:TEST], tokenizer)


@pytest.fixture(scope="module")
def first():
    """Two batches of snippets, for what depends on no number of them."""
    train, _ = snippets.split(snippets.load_snippets())
    return TokenizedSnippets(train[:64], load_tokenizer())


@pytest.fixture(scope="module")
def lora(data):
    """Two epochs over 320 snippets, that is 20 steps."""
    return training.train_adapter(training.LORA, *data, seed=0, epochs=2)


@pytest.fixture(scope="module")
def adalora(data):
    """The same with AdaLoRA: warm-up 2 steps, an allocation at step 10, frozen at step 14."""
    return training.train_adapter(training.ADALORA, *data, seed=0, epochs=2)


def test_data_and_split():
    every = snippets.load_snippets()
    train, test = snippets.split(every)
    assert (len(every), len(train), len(test)) == (10_605, 8_484, 2_121)
    assert sorted(train + test, key=repr) == sorted(every, key=repr)
    assert (train, test) == snippets.split(every)
    assert sum(s.label for s in every) == 5_242
    assert every[92].text.count("clichés") == 1
    assert every[-1].text == every[-1].text.strip() != ""


def test_a_damaged_archive_is_fetched_again(tmp_path):
    good = (snippets.CACHE / snippets.ARCHIVE).read_bytes()
    (tmp_path / snippets.ARCHIVE).write_bytes(good[:-1])
    assert len(snippets.load_snippets(tmp_path)) == snippets.COUNT
    assert (tmp_path / snippets.ARCHIVE).read_bytes() == good
    assert [path.name for path in tmp_path.iterdir()] == [snippets.ARCHIVE]


def test_no_download_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(snippets.DataError, match=r"^The review snippets \(.*\) cannot be .*\.$"):
        snippets.load_snippets(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_batches_cover_every_snippet_once_and_follow_the_seed(data):
    train, _ = data

    def epoch(seed):
        return list(train.training_batches(32, torch.Generator().manual_seed(seed)))

    first, again, other = epoch(0), epoch(0), epoch(1)
    rows = torch.cat([batch.indices for batch in first])
    assert rows.sort().values.tolist() == list(range(TRAIN))
    assert rows.tolist() == torch.cat([batch.indices for batch in again]).tolist()
    assert rows.tolist() != torch.cat([batch.indices for batch in other]).tolist()
    for batch in first:
        lengths = train.lengths[batch.indices]
        assert batch.attention_mask.sum(1).tolist() == lengths.tolist()
        assert batch.input_ids.shape[1] == lengths.max()
        assert batch.labels.tolist() == train.labels[batch.indices].tolist()
    padded = sum(batch.input_ids.numel() for batch in first)
    assert padded < 1.25 * train.lengths.sum(), "texts of like length must share a batch"


def test_padding_does_not_change_the_logits(data, lora):
    _, test = data
    alone = torch.cat([lora.model.eval()(**b.inputs).detach() for b in test.evaluation_batches(1)])
    order = torch.cat([b.indices for b in test.evaluation_batches(1)])
    assert torch.allclose(alone, predict(lora.model, test)[order], atol=1e-5, rtol=0)


def test_lora_learns(lora):
    assert len(lora.losses) == 20 and len(lora.accuracies) == 2
    assert training.mean(lora.losses[-5:]) < training.mean(lora.losses[:5]) - 0.05
    assert lora.trainable == rw.summary(lora.model).trainable


def test_adalora_ends_with_the_parameters_of_lora(data, lora, adalora):
    allocator, layers = adalora.allocator, rw.summary(adalora.model).layers
    assert allocator.frozen and allocator.steps == 20 and allocator.skipped_steps == 0
    assert {x.name: x.rank for x in layers} == allocator.ranks
    assert len(set(allocator.ranks.values())) > 1, "every matrix got the same rank"
    lora_A_and_B = adalora.trainable - sum(allocator.ranks.values())  # without E
    cost = max(x.in_features + x.out_features for x in layers)
    assert lora.trainable - cost < lora_A_and_B <= lora.trainable


def test_same_seed_same_numbers(first):
    runs = [
        training.train_adapter(training.ADALORA, first, first, seed=3, epochs=1) for _ in range(2)
    ]
    assert runs[0].losses == runs[1].losses
    assert torch.equal(predict(runs[0].model, first), predict(runs[1].model, first))


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_promises_of_the_adapter_are_kept(data, method, request, tmp_path):
    _, test = data
    model = request.getfixturevalue(method).model
    checked = promises.check_adapter(method, model, test, tmp_path)
    assert [promise for promise in checked if not promise.kept] == []
    assert len(checked) == 4


def test_pefts_false_alarm_is_one_line(tmp_path, capsys, recwarn):
    base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    config = rw.AdaLoRAConfig(
        initial_rank=2, target_rank=1, total_steps=4, target_modules=["0", "1"]
    )
    model = rw.apply_lora(copy.deepcopy(base), config)
    model[0].rank = 1  # as after allocation: so a rank_pattern is saved
    with torch.no_grad():
        for factor in (model[0].lora_A, model[0].lora_B.t(), model[0].lora_E):
            factor[1:] = 0
    rw.save_adapter(model, tmp_path)
    loaded = promises.load_with_peft(base, tmp_path)
    assert loaded.base_model.model[0].lora_E["default"].shape[0] == 1, "the pattern is used"
    assert capsys.readouterr().out == promises.INSTEAD + "\n"
    assert not recwarn.list


@pytest.mark.parametrize("keys", ["alpha_pattern keys", "rank_pattern keys"])
def test_other_warnings_of_peft_pass(keys, tmp_path, capsys, monkeypatch):
    text = f"The following {keys} did not match any targeted module and were ignored: ['query']."

    def load(*_):
        warnings.warn(text, RuntimeWarning, stacklevel=2)
        return "loaded"

    monkeypatch.setattr(promises.PeftModel, "from_pretrained", load)
    with pytest.warns(RuntimeWarning, match=re.escape(text)):
        assert promises.load_with_peft(None, tmp_path) == "loaded"
    assert capsys.readouterr().out == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_the_progress_line_says_the_time_left(stream, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream())
    with training.progress("LoRA", 100) as bar:
        bar.update(50)
        bar.refresh()
    line = r"LoRA:  50%.*\| 50/100 samples, [\d.]+ samples/s, \d\d:\d\d left"
    written = sys.stderr.getvalue()
    assert re.search(line, written) if stream is Terminal else written == ""


def test_one_changed_bit_is_found():
    encoder = load_encoder()
    with torch.no_grad():
        encoder.embeddings.LayerNorm.weight.view(torch.int32)[7] ^= 1
    assert promises.changed_bits(encoder, load_encoder()) == 1


def test_head_on_frozen_features(data):
    train, test = data
    head = training.train_head(training.encode(train, test), train, test, seed=0)
    assert head.trainable == 2 * 384 + 2
    assert training.mean(head.losses[-10:]) < training.mean(head.losses[:10])


def test_the_command_reports_a_broken_promise(first, tmp_path, monkeypatch, capsys):
    """The whole command on 64 snippets: too few for the accuracy that it promises."""
    monkeypatch.setattr(demo, "load_data", lambda: (first, first))
    monkeypatch.setattr(promises, "MINIMUM_ACCURACY", 1.01)
    with pytest.raises(typer.Exit) as stopped:
        demo.main(epochs=1, seed=0, seeds=2, output=tmp_path)
    assert stopped.value.exit_code == 1
    printed = capsys.readouterr().out
    assert printed.count("BROKEN") == 2 and printed.count("kept") >= 8
    assert printed.count("health check after the first step: 36 adapters") == 4
    assert "Ranks that AdaLoRA left" in printed
    for figure in ("training.png", "ranks.png"):
        assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG")
    for folder in ("lora", "adalora"):
        assert (tmp_path / folder / "adapter_config.json").is_file()
