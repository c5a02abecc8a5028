# EVA: what it refuses by name, before anything is changed.
import pytest
import torch
from small_models import assert_unchanged, bert, fingerprint
from test_first_inputs import CONFIG, plain, rows
from torch import nn

import rankwise as rw


class TwoBranches(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(20, 4), nn.Linear(20, 4)

    def forward(self, x):
        return self.used(x)


def fails_at_the_second(model):
    calls = []

    def hook(module, args):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("the user's data")

    model[4].register_forward_pre_hook(hook)
    return model


REFUSED = {
    "no batches": (plain, CONFIG, [], "batches must have at least one batch, got none"),
    "few rows": (
        plain,
        CONFIG,
        [rows(7)],
        r"EVA: '0' must see at least as many inputs as it can have directions, 10, got 7",
    ),
    "never called": (
        lambda: TwoBranches().double(),
        rw.LoRAConfig(rank=1, target_modules=["used", "unused"]),
        [rows()],
        r"EVA: 'unused' must see at least as many .* got 0; give more batches, or exclude it",
    ),
    "nan": (plain, CONFIG, [rows() * torch.nan], "EVA: '0' must have finite inputs"),
    "embedding": (
        bert,
        rw.LoRAConfig(target_modules=["word_embeddings"]),
        [torch.arange(14).view(2, 7)],
        "EVA: 'embeddings.word_embeddings' must be a linear layer, got an embedding",
    ),
    "adalora": (
        plain,
        rw.AdaLoRAConfig(total_steps=10, target_modules=["0"]),
        [rows()],
        "EVA: '0' has AdaLoRA's first values",
    ),
    "the model fails": (lambda: fails_at_the_second(plain()), CONFIG, [rows(), rows()], "user's"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name_before_anything_is_changed(case):
    build, config, batches, message = REFUSED[case]
    model = build().train()
    before = fingerprint(model)
    with pytest.raises((ValueError, RuntimeError), match=message):
        rw.apply_lora(model, config, first_values=rw.EVA(batches))
    assert_unchanged(model, before)
    assert not any(m._forward_pre_hooks_with_kwargs for m in model.modules())
