# The runner: MiniLM with an adapter, compiled ahead of time, served from C++.
import json
import subprocess
import sys
import zipfile

import export_similarity as export
import pytest
import torch
from classifier import new_classifier
from cpp_programs import EXAMPLES, output_of

import rankwise as rw

PAIRS = [
    ("a wonderful film", "a terrible film"),
    ("The cat sat on the mat.", "A cat is sitting on a rug."),
    ("I love this", "The market fell by three percent on Monday, its worst day of the year"),
]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A PEFT folder for the encoder, whose update is far from zero."""
    torch.manual_seed(0)
    model = export.Embedder(export.model_folder())
    config = rw.LoRAConfig(rank=4, alpha=8.0, target_modules=["query", "value", "dense"])
    rw.apply_lora(model, config)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.02)
    folder = tmp_path_factory.mktemp("adapter")
    rw.save_adapter(model, folder)
    return folder


@pytest.fixture(scope="module")
def compiled(adapter, tmp_path_factory):
    """The script's output: model.pt2 and pairs.pt."""
    folder = tmp_path_factory.mktemp("compiled")
    pairs = folder / "pairs.txt"
    pairs.write_text("\n".join("\t".join(pair) for pair in PAIRS))
    script = EXAMPLES / "cpp" / "export_similarity.py"
    subprocess.run([sys.executable, script, adapter, pairs, folder], check=True)
    return folder


@torch.no_grad()
def similarity(model, inputs) -> torch.Tensor:
    first, second = model(**inputs).unflatten(0, (-1, 2)).unbind(1)
    return torch.nn.functional.cosine_similarity(first, second)


def served(programs, compiled, pairs) -> torch.Tensor:
    printed = output_of(programs / "similarity", compiled / "model.pt2", pairs)
    return torch.tensor([float(line) for line in printed.splitlines()])


def test_cpp_serves_what_python_computes(programs, compiled, adapter):
    inputs = torch.load(compiled / "pairs.pt", weights_only=True)
    wanted = similarity(export.load_model(adapter), inputs)
    got = served(programs, compiled, compiled / "pairs.pt")
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    assert got[1] > 0.5 > 0.3 > got[2], "a paraphrase and two texts that have nothing in common"
    base = similarity(export.Embedder(export.model_folder()).eval(), inputs)
    assert (base - wanted).abs().max() > 1e-3, "the adapter must matter"


@pytest.mark.parametrize("texts", [["Hi", "Bye"], ["one two three " * 40, "one"] * 5])
def test_other_numbers_of_texts_of_other_lengths(programs, compiled, adapter, texts, tmp_path):
    inputs = export.tokenize(texts)
    torch.save(inputs, tmp_path / "pairs.pt")
    got = served(programs, compiled, tmp_path / "pairs.pt")
    wanted = similarity(export.load_model(adapter), inputs)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_the_adapter_is_operators_in_the_package(compiled, adapter):
    """Neither merged nor taken apart: the compiled program calls rankwise's operator by name."""
    with zipfile.ZipFile(compiled / "model.pt2") as package:
        (calls,) = [name for name in package.namelist() if name.endswith("wrapper.json")]
        targets = [call["node"]["target"] for call in json.loads(package.read(calls))["nodes"]]
    layers = rw.summary(export.load_model(adapter)).layers
    assert targets == ["rankwise::_lora_linear_forward"] * len(layers) and len(layers) == 30


def test_a_classifiers_adapter_is_taken_without_its_head(tmp_path):
    """What make demo writes."""
    classifier = new_classifier(seed=0)
    config = rw.LoRAConfig(rank=2, target_modules="all-linear", modules_to_save=["head"])
    rw.apply_lora(classifier, config)
    rw.save_adapter(classifier, tmp_path)
    model = export.load_model(tmp_path)
    assert len(rw.summary(model).layers) == 36 and not hasattr(model, "head")


def test_an_adapter_of_other_modules_is_refused(tmp_path):
    model = export.Embedder(export.model_folder())
    model.decoder = torch.nn.Linear(4, 4)
    rw.apply_lora(model, rw.LoRAConfig(rank=2, target_modules=["decoder"]))
    rw.save_adapter(model, tmp_path / "decoder")
    rw.add_adapter(model, "both", rw.LoRAConfig(rank=2, target_modules=["query", "decoder"]))
    rw.save_adapter(model, tmp_path / "both", "both")
    with pytest.raises(rw.FileError, match="the model has no module 'decoder'"):
        export.load_model(tmp_path / "decoder")
    with pytest.raises(ValueError, match="no place for .*decoder.lora_A.weight"):
        export.load_model(tmp_path / "both")


def test_lines_that_are_no_pairs_are_refused(adapter, tmp_path):
    for content in ("", "one text\n", "a\tb\tc\n"):
        pairs = tmp_path / "pairs.txt"
        pairs.write_text(content)
        with pytest.raises(SystemExit, match="each line must be two texts with a tab between"):
            export.main(str(adapter), str(pairs), str(tmp_path))
    assert not (tmp_path / "model.pt2").exists()
