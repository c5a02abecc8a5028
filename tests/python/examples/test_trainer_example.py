# PEFT's AdaLoRA in the Trainer, on a few hundred snippets.
import peft
import torch
import trainer_adalora
from classifier import load_tokenizer, weights_folder
from snippets import load_snippets, split
from transformers import AutoModelForSequenceClassification


def test_adalora_in_the_trainer(tmp_path):
    accuracy = trainer_adalora.main(epochs=1, snippets=480, output=tmp_path)
    base = AutoModelForSequenceClassification.from_pretrained(weights_folder(), num_labels=2)
    stock = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    pattern = stock.peft_config["default"].rank_pattern
    assert sum(sum(kept) for kept in pattern.values()) == 4 * 18
    test = split(load_snippets())[1][:96]
    tokens = load_tokenizer()([s.text for s in test], padding=True, return_tensors="pt")
    with torch.no_grad():
        right = stock(**tokens).logits.argmax(1) == torch.tensor([s.label for s in test])
    assert right.double().mean().item() == accuracy
