"""Questions and answers in English from the package chatterbot-corpus (BSD licence)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
import yaml

SPLIT_SEED = 0

Dialogue = list[dict[str, str]]  # {"role": "user" | "assistant", "content": text}, in turn


def load_dialogues() -> list[Dialogue]:
    """Each dialogue once, in the order of the files; an unanswered last question is left out."""
    package = Path(find_spec("chatterbot_corpus").submodule_search_locations[0])
    found: dict[tuple[str, ...], None] = {}
    for path in sorted((package / "data" / "english").glob("*.yml")):
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            found[tuple(str(turn) for turn in turns[: len(turns) // 2 * 2])] = None
    roles = ("user", "assistant")
    return [
        [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)] for turns in found
    ]


def split(dialogues: list[Dialogue]) -> tuple[list[Dialogue], list[Dialogue]]:
    """90 % for training and 10 % held out, the same in every run."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    order = torch.randperm(len(dialogues), generator=generator).tolist()
    held_out = len(dialogues) // 10
    return [dialogues[i] for i in order[held_out:]], [dialogues[i] for i in order[:held_out]]
