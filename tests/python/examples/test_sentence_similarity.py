# sentence-transformers over PEFT's LoRA, on a few hundred snippets.
import peft
import sentence_similarity
from classifier import weights_folder
from peft_of_transformers import needs_peft_of_transformers
from sentence_transformers import SentenceTransformer
from snippets import load_snippets, split


@needs_peft_of_transformers
def test_it_learns_and_others_read_the_folder(tmp_path):
    before, after = sentence_similarity.main(epochs=1, snippets=640, output=tmp_path)
    assert before < after
    stock = SentenceTransformer(str(weights_folder()), device="cpu")
    stock[0].auto_model = peft.PeftModel.from_pretrained(
        stock[0].auto_model, str(tmp_path / "adapter")
    )
    train, test = split(load_snippets())
    assert sentence_similarity.nearest_accuracy(stock, train[:512], test[:128]) == after
