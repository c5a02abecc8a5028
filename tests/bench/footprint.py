# What is kept and what is moved: files, the optimizer's state, and the most memory of a step.
"""MiniLM trained whole, with LoRA by rankwise and by PEFT, and with AdaLoRA; and one linear layer.

Of a step: the most bytes that one (forward, backward, AdamW) allocates over what there was before,
after a first that does not count, gradients set to None between. Of the layer: the same of forward
and backward alone. Training it whole makes a gradient [out, in]; LoRA makes none, so that its peak
is lower however few tokens there are.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import peft
import torch
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn

import rankwise as rw

from .measurement import Measurement, number
from .memory import peak_bytes
from .step_tasks import Task, minilm
from .timing import console

RANK = 8
TARGETS = ["query", "value"]


def whole(task: Task) -> nn.Module:
    return task.model.requires_grad_(True)


def lora(task: Task) -> nn.Module:
    return rw.apply_lora(task.model, rw.LoRAConfig(rank=RANK, target_modules=TARGETS))


def adalora(task: Task) -> nn.Module:
    config = rw.AdaLoRAConfig(
        initial_rank=12, target_rank=RANK, total_steps=100, target_modules=TARGETS
    )
    return rw.apply_lora(task.model, config)


def stock(task: Task) -> nn.Module:
    return peft.get_peft_model(task.model, peft.LoraConfig(r=RANK, target_modules=TARGETS))


CONTENDERS: dict[str, Callable[[Task], nn.Module]] = {
    "trained whole": whole,
    "LoRA": lora,
    "AdaLoRA of rank 12": adalora,
    "PEFT LoRA": stock,
}


def run(options: Namespace) -> dict[str, dict]:
    task = minilm()
    found = {}
    for name, make in CONTENDERS.items():
        own = Task(**(vars(task) | {"model": copy.deepcopy(task.model)}))
        found[name] = measured(make(own), task.inputs, options.repeats)
    title = f"{task.name}: q and v, r = {RANK}"
    console.print(shown(title, found))
    layer = {
        name: layer_peak(name, options.width, tokens, options.repeats)
        for tokens in (1, options.tokens)
        for name in (f"trained whole, {tokens} tokens", f"LoRA, {tokens} tokens")
    }
    title = f"One layer {options.width} x {options.width}, float32: a gradient of W is "
    title += f"{options.width**2 * 4:,} bytes"
    console.print(
        shown(title, {name: {"peak of forward and backward": p} for name, p in layer.items()})
    )
    return {"models": found, "layer": layer}


def measured(model: nn.Module, inputs: dict[str, Tensor], repeats: int) -> dict[str, int]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)

    def step() -> None:
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()

    peak = peak_of(step, optimizer.zero_grad, repeats)
    state = sum(t.nbytes for own in optimizer.state.values() for t in own.values())
    return {
        "trained parameters": sum(p.numel() for p in trained),
        "file": file_bytes(model),
        "optimizer's state": state,
        "peak of a step": peak,
    }


def file_bytes(model: nn.Module) -> int:
    """Of the weights that a checkpoint has to hold."""
    with TemporaryDirectory() as folder:
        if isinstance(model, peft.PeftModel):
            model.save_pretrained(folder)
        elif any(isinstance(m, rw.nn.LoRALinear) for m in model.modules()):
            rw.save_adapter(model, folder)
        else:
            save_file({k: v.contiguous() for k, v in model.state_dict().items()},
                      Path(folder) / "model.safetensors")  # fmt: skip
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def layer_peak(name: str, width: int, tokens: int, repeats: int) -> int:
    layer: nn.Module = nn.Linear(width, width, bias=False)
    if name.startswith("LoRA"):
        layer = rw.nn.LoRALinear.from_linear(layer, rank=RANK)
    x = torch.randn(tokens, width, requires_grad=True)

    def step() -> None:
        layer(x).sum().backward()

    def forget() -> None:
        for tensor in (x, *layer.parameters()):
            tensor.grad = None

    return peak_of(step, forget, repeats)


def peak_of(step: Callable[[], None], forget: Callable[[], None], repeats: int) -> int:
    """The largest, after a step that makes what stays."""
    step()
    peaks = []
    for _ in range(repeats):
        forget()
        peaks.append(peak_bytes(step))
    return max(peaks)


def shown(title: str, found: dict[str, dict[str, int]]) -> Table:
    result = Table(title=title, title_justify="left")
    result.add_column("")
    for column in next(iter(found.values())):
        result.add_column(column, justify="right")
    for name, own in found.items():
        result.add_row(name, *(f"{value:,}" for value in own.values()))
    return result


MEASUREMENT = Measurement(
    run,
    repeats=3,
    quick={"repeats": 2},
    arguments={
        "--width": number(4096, "of the one layer"),
        "--tokens": number(512, "of the one layer's larger batch"),
    },
)
