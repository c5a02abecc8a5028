# The registry of measurements: the name and the object of each.
"""Each is the module of its name, with a MEASUREMENT; only the one that is run is imported."""

from __future__ import annotations

import sys
from pathlib import Path

MEASUREMENTS = {
    "layers": "one linear layer with LoRA against the frozen layer, PEFT and other peers",
    "group": "layers that share their input, one by one and as a group",
    "growth": "how the cost of LoRA grows with rank, tokens, width and number of layers",
    "tree": "applying, saving and loading in models of up to 10,000 layers against PEFT",
    "allocator": "AdaLoRA's allocator against PEFT's",
    "step": "whole training steps of pretrained models against PEFT's",
    "llama_step": "whole training steps of a Llama-shaped model, time and memory, against PEFT's",
    "latency": "inference of MiniLM with LoRA, bottlenecks and prefixes",
    "footprint": "files, optimizer state and peak memory against training all weights",
    "overhead": "what the Python of a layer costs beside its operator",
    "host": "instructions that a small call costs beside its matrix products",
    "layers_cuda": "one linear layer with LoRA on a GPU against the frozen layer and its peers",
    "kernels": "the kernels that one linear layer runs on a GPU, each by its time",
}
ROOT = Path(__file__).resolve().parents[2]

# The operators' shapes and samples, and the examples' models: folders of modules, not packages.
FOLDERS = ("tests/python/ops", "examples/sentiment", "examples/smollm2")
sys.path[:0] = [str(ROOT / folder) for folder in FOLDERS]
