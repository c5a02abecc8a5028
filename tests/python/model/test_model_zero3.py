# Parameters that DeepSpeed's ZeRO-3 has partitioned: every call names it and the way out.
import pytest
import torch
from torch import nn

import rankwise as rw

CONFIG = rw.LoRAConfig(rank=2, target_modules=["0", "1"])
ADALORA = rw.AdaLoRAConfig(initial_rank=2, target_rank=1, total_steps=9, target_modules=["0"])
WHOLE = rw.LoRAConfig(rank=2, target_modules=["1"], modules_to_save=["0"])


def partitioned(module: nn.Module) -> nn.Module:
    """As ZeRO-3 leaves parameters between uses: no elements here, the sizes in attributes."""
    for parameter in module.parameters():
        parameter.ds_shape, parameter.ds_numel = parameter.shape, parameter.numel()
        parameter.data = torch.empty(0, dtype=parameter.dtype)
    return module


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Embedding(5, 4))


def adapted(config=CONFIG) -> nn.Module:
    return rw.apply_lora(plain(), config)


def whole_partitioned() -> nn.Module:
    model = adapted(WHOLE)
    partitioned(model[0])
    return model


CALLS = {
    "apply_lora": lambda folder: rw.apply_lora(partitioned(plain()), CONFIG),
    "modules_to_save": lambda folder: rw.apply_lora(
        nn.Sequential(partitioned(nn.Linear(4, 4)), nn.Linear(4, 4)), WHOLE
    ),
    "from_linear": lambda folder: rw.nn.LoRALinear.from_linear(partitioned(nn.Linear(4, 4))),
    "add_adapter": lambda folder: rw.add_adapter(partitioned(adapted()), "other", CONFIG),
    "save_adapter": lambda folder: rw.save_adapter(partitioned(adapted()), folder / "new"),
    "save_adapter, whole": lambda folder: rw.save_adapter(whole_partitioned(), folder / "new"),
    "export_lora": lambda folder: rw.export_lora(partitioned(adapted()), folder / "new"),
    "load_adapter": lambda folder: rw.load_adapter(partitioned(adapted()), folder / "good"),
    "load_adapter, new": lambda folder: rw.load_adapter(partitioned(plain()), folder / "good"),
    "merge": lambda folder: rw.merge(partitioned(adapted())),
    "unload": lambda folder: rw.unload(partitioned(adapted())),
    "summary": lambda folder: rw.summary(partitioned(adapted())),
    "health_check": lambda folder: rw.health_check(partitioned(adapted())),
    "updates": lambda folder: rw.analysis.updates(partitioned(adapted())),
    "delta_spectrum": lambda folder: rw.analysis.delta_spectrum(partitioned(adapted())[0]),
    "allocator": lambda folder: rw.RankAllocator(partitioned(adapted(ADALORA)), ADALORA),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_zero3_partitioned_is_refused_by_its_name(call, tmp_path):
    rw.save_adapter(adapted(), tmp_path / "good")
    with pytest.raises(ValueError, match=r"partitioned by DeepSpeed's ZeRO-3; .+"):
        CALLS[call](tmp_path)
    assert not (tmp_path / "new").exists()


def test_the_way_to_gather_keeps_what_is_written(tmp_path):
    """Without modifier_rank DeepSpeed forgets what was written to gathered parameters."""
    rw.save_adapter(adapted(), tmp_path)
    with pytest.raises(ValueError, match=r"GatheredParameters\(.*, modifier_rank=0\)"):
        rw.load_adapter(partitioned(adapted()), tmp_path)


def test_small_parameters_that_zero3_keeps_whole_are_taken():
    """It has attributes on all parameters; those below a size stay in every process."""
    model = adapted()
    for parameter in model.parameters():
        parameter.ds_shape, parameter.ds_numel = parameter.shape, parameter.numel()
    assert rw.summary(model).total == sum(p.numel() for p in model.parameters())
    assert rw.merge(model).keys() == {"0", "1"}
