"""Batches of texts of like length, padded to the longest of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from snippets import Snippet
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

# Batches whose texts are sorted together: enough that a batch is nearly rectangular, few enough
# that its texts are still a random sample.
GROUP = 50


@dataclass(frozen=True)
class Batch:
    """`indices` [batch] are the rows in the data set; ids and mask are [batch, tokens]; int64."""

    indices: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The model's arguments."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}


class TokenizedSnippets:
    """Snippets as token ids, tokenized once; the longest has 79, so none is cut."""

    def __init__(self, snippets: list[Snippet], tokenizer: PreTrainedTokenizerBase) -> None:
        self.ids = [torch.tensor(ids) for ids in tokenizer([s.text for s in snippets])["input_ids"]]
        self.labels = torch.tensor([s.label for s in snippets])
        self.lengths = torch.tensor([len(ids) for ids in self.ids])
        self.padding = tokenizer.pad_token_id

    def __len__(self) -> int:
        return len(self.ids)

    def training_batches(self, size: int, generator: Generator) -> Iterator[Batch]:
        """Every snippet once, in a random order that depends on the generator's state alone."""
        order = torch.randperm(len(self), generator=generator)
        groups = [rows[self._by_length(rows)] for rows in order.split(GROUP * size)]
        batches = [rows for group in groups for rows in group.split(size)]
        for i in torch.randperm(len(batches), generator=generator).tolist():
            yield self._batch(batches[i])

    def evaluation_batches(self, size: int) -> Iterator[Batch]:
        """Every snippet once, from the shortest to the longest."""
        for rows in self._by_length(torch.arange(len(self))).split(size):
            yield self._batch(rows)

    def _by_length(self, rows: Tensor) -> Tensor:
        return self.lengths[rows].argsort(stable=True)

    def _batch(self, rows: Tensor) -> Batch:
        texts = [self.ids[row] for row in rows.tolist()]
        input_ids = pad_sequence(texts, batch_first=True, padding_value=self.padding)
        mask = torch.arange(input_ids.shape[1]) < self.lengths[rows].unsqueeze(1)
        return Batch(rows, input_ids, mask.long(), self.labels[rows])
