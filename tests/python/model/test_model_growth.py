# The work of every call on a model grows with its layers, not with their square: calls are counted,
# of Python's functions and of C's from Python, so that no clock is needed.
import sys

import pytest
import torch
from torch import nn

import rankwise as rw

SIZES = (40, 80)
MOST = 2.3  # times the work for twice the layers; the square would be 4


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.value = nn.Linear(2, 2), nn.Linear(2, 2)


def build(layers: int) -> nn.Module:
    """`layers` linear layers in blocks, and a head and as many normalisations beside them."""
    model = nn.Module()
    model.blocks = nn.ModuleList(Block() for _ in range(layers // 2))
    model.norms = nn.ModuleList(nn.LayerNorm(2) for _ in range(layers // 2))
    model.head = nn.Linear(2, 2)
    return model


def names_of(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "head"]


def adapted(layers: int, **config) -> nn.Module:
    return rw.apply_lora(
        build(layers), rw.LoRAConfig(rank=2, target_modules="all-linear", **config)
    )


def pruned(layers: int) -> nn.Module:
    """AdaLoRA's layers with ranks that differ."""
    config = rw.AdaLoRAConfig(
        initial_rank=3, total_steps=9, target_rank=1, target_modules=r".*\.\d+\..*"
    )
    model = rw.apply_lora(build(layers), config)
    for i, layer in enumerate(m for m in model.modules() if isinstance(m, rw.nn.AdaLoRALinear)):
        layer.rank = i % 4
    return model


def saved(model: nn.Module, folder) -> nn.Module:
    rw.save_adapter(model, folder)
    return model


def different(model: nn.Module) -> dict[str, int]:
    return {name: 1 + i % 7 for i, name in enumerate(names_of(model))}


def apply_by_names(layers, folder):
    model = build(layers)
    return lambda: rw.apply_lora(model, rw.LoRAConfig(target_modules=names_of(model)))


def apply_with_patterns(layers, folder):
    model = build(layers)
    patterns = {"rank_pattern": different(model), "alpha_pattern": different(model)}
    config = rw.LoRAConfig(target_modules=names_of(model), **patterns)
    return lambda: rw.apply_lora(model, config)


def apply_with_escaped_patterns(layers, folder):
    model = build(layers)
    patterns = {name.replace(".", r"\."): rank for name, rank in different(model).items()}
    config = rw.LoRAConfig(target_modules="all-linear", rank_pattern=patterns)
    return lambda: rw.apply_lora(model, config)


def apply_excluding_and_training_whole(layers, folder):
    model = build(layers)
    whole = [f"norms.{i}" for i in range(layers // 2)]
    config = rw.LoRAConfig(
        target_modules="all-linear", exclude_modules=["value"], modules_to_save=whole
    )
    return lambda: rw.apply_lora(model, config)


def add(layers, folder):
    model = adapted(layers)
    return lambda: rw.add_adapter(model, "other", rw.LoRAConfig(target_modules=names_of(model)))


def switch(layers, folder):
    model = adapted(layers, modules_to_save=["norms.0"])

    def run():
        rw.activate_adapter(model, None)
        rw.activate_adapter(model, "default")
        with rw.disable_adapters(model):
            pass
        rw.merge(model)
        rw.unmerge(model)

    return run


def unload(layers, folder):
    model = adapted(layers, modules_to_save=["norms.0"])
    return lambda: rw.unload(model)


def save(layers, folder):
    model = adapted(layers, rank_pattern=different(build(layers)))
    return lambda: rw.save_adapter(model, folder)


def save_adalora(layers, folder):
    model = pruned(layers)
    return lambda: rw.save_adapter(model, folder)


def export(layers, folder):
    model = adapted(layers)
    return lambda: rw.export_lora(model, folder)


def load(layers, folder):
    saved(adapted(layers, rank_pattern=different(build(layers))), folder)
    model = build(layers)
    return lambda: rw.load_adapter(model, folder)


def load_adalora(layers, folder):
    saved(pruned(layers), folder)
    model = build(layers)
    return lambda: rw.load_adapter(model, folder)


def load_in_place(layers, folder):
    model = saved(adapted(layers), folder)
    return lambda: rw.load_adapter(model, folder)


def load_into_another_model(layers, folder):
    saved(adapted(layers), folder)

    def run():
        with pytest.raises(rw.FileError):
            rw.load_adapter(nn.ModuleList([build(layers)]), folder)

    return run


def look(layers, folder):
    model = adapted(layers)
    return lambda: (str(rw.summary(model)), str(rw.health_check(model)))


def shrink(layers, folder):
    model = build(layers)
    config = rw.AdaLoRAConfig(
        initial_rank=2, target_rank=1, total_steps=9, target_modules=["query"]
    )
    rw.apply_lora(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)

    def run():
        allocator = rw.RankAllocator(model, config)
        for parameter in trained:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        allocator.step(optimizer)
        allocator.freeze(optimizer)
        allocator.load_state_dict(allocator.state_dict())

    return run


WORK = [
    apply_by_names, apply_with_patterns, apply_with_escaped_patterns,
    apply_excluding_and_training_whole, add, switch, unload, save, save_adalora, export, load,
    load_adalora, load_in_place, load_into_another_model, look, shrink,
]  # fmt: skip


def calls(action) -> int:
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("work", WORK)
def test_twice_the_layers_are_twice_the_work(work, tmp_path):
    work(4, tmp_path / "first")()  # imports and caches
    few, many = (calls(work(layers, tmp_path / str(layers))) for layers in SIZES)
    assert many / few < MOST, f"{few} and {many} calls for {SIZES} layers"
