"""AdaLoRA folders that do not fit or are damaged, and adapters that PEFT's format cannot hold."""

import json

import pytest
from file_models import prune, refuses
from torch import nn

import rankwise as rw


def three_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3))


def adalora(**options) -> nn.Module:
    options = {
        "initial_rank": 3,
        "target_rank": 2,
        "total_steps": 10,
        "target_modules": ["0", "1"],
        **options,
    }
    return rw.apply_lora(three_layers(), rw.AdaLoRAConfig(**options))


@pytest.fixture
def folder(tmp_path):
    """A good adapter of three_layers(), with ranks 3 and 1."""
    model = adalora()
    prune(model[1], 1)
    rw.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_another_rank_in_the_adapter_that_is_there(folder):
    refuses(
        adalora(),
        folder,
        r"1.lora_A: must be \[3, 5\], got \[1, 5\]",
        r"1.lora_B: must be \[4, 3\], got \[4, 1\]",
        r"1.lora_E: must be \[3, 1\], got \[1, 1\]",
    )


def test_another_scaling_in_the_adapter_that_is_there(folder):
    model = adalora(alpha=3.0)
    prune(model[1], 1)
    refuses(model, folder, "0: scaling must be 1, got 8", "1: scaling must be 1, got 8")


def test_another_method_in_the_adapter_that_is_there(folder):
    lora = rw.LoRAConfig(rank=3, alpha=24.0, target_modules=["0", "1"])
    model = rw.apply_lora(three_layers(), lora)
    refuses(model, folder, "0.lora_E: the model's 0 is a LoRALinear", "0.lora_A.weight: missing in")
    rw.save_adapter(model, folder)
    refuses(adalora(), folder, "the model's 0 is a AdaLoRALinear", "1.lora_E: missing in the file")


def test_a_model_without_such_layers(folder):
    refuses(nn.Sequential(nn.Linear(6, 5)), folder, "1.lora_E: the model has no module '1'")
    model = nn.Sequential(nn.Embedding(6, 5), nn.Linear(5, 4))
    refuses(model, folder, "0.lora_A: the model's 0 is a Embedding without a place for it")


CONFIGS = {
    "init_r": (2, r'rank_pattern "0.lora_E" must be a list of init_r = 2 booleans, got 3'),
    "rank_pattern": ({"1.lora_E": [True] * 3}, r"1.lora_E\": must be \[3, 1\], got \[1, 1\]"),
    "lora_alpha": (0, r"lora_alpha must be in \(0, 1e300\)"),
    "tinit": (7, "damaged, or changed since it was saved: rankwise.config_checksum"),
    "peft_type": ("LORA", 'rank_pattern "0.lora_E" must be an integer, got array'),
    "use_dora": (True, "not supported: use_dora"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_do_not_fit(folder, name):
    value, message = CONFIGS[name]
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    refuses(three_layers(), folder, message)


def test_a_pattern_for_a_module_that_is_not_there(folder):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["rank_pattern"]["2.lora_E"] = [False] * 3
    path.write_text(json.dumps(config))
    refuses(three_layers(), folder, 'rank_pattern "2.lora_E": there is no such module')


def test_adapters_that_pefts_format_cannot_hold(tmp_path):
    def save(*layers):
        rw.save_adapter(nn.Sequential(*layers), tmp_path / "new")

    layer = rw.nn.AdaLoRALinear
    with pytest.raises(ValueError, match=r"one initial rank for all layers, got \[2, 3\]; use exp"):
        save(layer(4, 4, rank=2, alpha=4.0), layer(4, 4, rank=3, alpha=6.0))
    with pytest.raises(ValueError, match=r"one alpha for all layers, got \[4.0, 5.0\]; use export"):
        save(layer(4, 4, rank=2, alpha=4.0), layer(4, 4, rank=2, alpha=5.0))
    with pytest.raises(ValueError, match="PEFT's AdaLoRA has no rslora; use export_lora"):
        save(layer(4, 4, rank=2, rslora=True))
    with pytest.raises(ValueError, match=r"one method for all layers, got \['AdaLoRA', 'LoRA'\]"):
        save(layer(4, 4, rank=2), rw.nn.LoRALinear(4, 4, rank=2))
    with pytest.raises(ValueError, match=r"one value of rslora for all layers, got \[False, True"):
        save(rw.nn.LoRALinear(4, 4), rw.nn.LoRALinear(4, 4, rslora=True))
    grown = layer(4, 4, rank=2, capacity=4)
    grown.rank = 3
    with pytest.raises(ValueError, match="at most the initial 2, got 3 in 1; use export_lora"):
        save(layer(4, 4, rank=2), grown)
    assert not (tmp_path / "new").exists()
