# Folders of models in wrappers: the plain model's, both ways; and those of earlier versions.
import json
import warnings

import peft
import pytest
import torch
from accelerate.utils import compile_regions
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from wrapped_models import WRAPPERS, compiled, parts_wrapped, plain, wrapped

import rankwise as rw

X = torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(2, 8)
KEYS = {f"base_model.model.{layer}.lora_{f}.weight" for layer in (0, 2) for f in "AB"}


def trained(model: nn.Module, **options) -> nn.Module:
    options = {"rank": 2, "target_modules": ["0", "2"], **options}
    rw.apply_lora(model, rw.LoRAConfig(**options))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(0.3 * noise)
    return model


def keys(folder) -> set[str]:
    return set(load_file(folder / "adapter_model.safetensors"))


def loaded(model: nn.Module, folder) -> nn.Module:
    rw.load_adapter(model, folder)
    return model


def in_peft(folder) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return peft.PeftModel.from_pretrained(plain(), folder)


def same(model: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(model(X), other(X), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wrap", [wrapped, parts_wrapped])
@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_folder_goes_from_any_model_to_any(kind, wrap, tmp_path):
    model, reference = (
        trained(wrap(kind), rank_pattern={"2": 3}),
        trained(plain(), rank_pattern={"2": 3}),
    )
    for name, save in (("saved", rw.save_adapter), ("exported", rw.export_lora)):
        save(model, tmp_path / name)
        assert keys(tmp_path / name) == KEYS
        same(loaded(plain(), tmp_path / name), reference)
    rw.save_adapter(reference, tmp_path / "plain")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        folders = [(tmp_path / name / file).read_bytes() for name in ("saved", "plain")]
        assert folders[0] == folders[1]
    same(loaded(wrap(kind), tmp_path / "plain"), reference)


@pytest.mark.parametrize("kind", ["compiled", "data-parallel", "averaged", "hiding"])
def test_stock_peft_computes_what_a_wrapped_model_did(kind, tmp_path):
    for wrap in (wrapped, parts_wrapped):
        rw.save_adapter(trained(wrap(kind)), tmp_path / wrap.__name__)
        same(in_peft(tmp_path / wrap.__name__), trained(plain()))


def test_wrapped_after_it_was_adapted(tmp_path):
    model = trained(plain())
    rw.save_adapter(nn.DataParallel(compiled(model)), tmp_path)
    assert keys(tmp_path) == KEYS
    same(loaded(compiled(plain()), tmp_path), model)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_modules_trained_whole_in_wrappers_and_with_wrappers_inside(kind, tmp_path):
    def build(wrap=lambda module: module):
        torch.manual_seed(7)
        head = nn.Sequential(wrap(nn.Linear(8, 8)), nn.LayerNorm(8)).double()
        head[1].register_buffer("table", torch.ones(3))
        return nn.Sequential(*plain(), wrap(head)).eval()

    options = {"modules_to_save": ["3"]}
    model, reference = trained(build(WRAPPERS[kind]), **options), trained(build(), **options)
    rw.save_adapter(model, tmp_path / "wrapped")
    rw.save_adapter(reference, tmp_path / "plain")
    whole = {"0.weight", "0.bias", "1.weight", "1.bias", "1.table"}
    tensors = {f"base_model.model.3.{name}" for name in whole}
    found = load_file(tmp_path / "wrapped" / "adapter_model.safetensors")
    assert KEYS | tensors <= found.keys() == keys(tmp_path / "plain")
    same(loaded(build(), tmp_path / "wrapped"), reference)
    same(loaded(build(WRAPPERS[kind]), tmp_path / "plain"), reference)


def test_adalora_ranks_and_schedule_of_a_compiled_model(tmp_path):
    config = rw.AdaLoRAConfig(
        initial_rank=3, target_rank=1, total_steps=9, target_modules=["0", "2"]
    )
    model = rw.apply_lora(compiled(plain()), config)
    rw.RankAllocator(model, config)
    [layer for layer in model.modules() if isinstance(layer, rw.nn.AdaLoRALinear)][1].rank = 1
    rw.save_adapter(model, tmp_path)
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert list(pattern) == ["0.lora_E", "2.lora_E"]
    other = loaded(nn.DataParallel(plain()), tmp_path)
    assert rw.adalora_config(other).target_modules == rw.adalora_config(model).target_modules
    assert [layer.rank for layer in rw.summary(other).layers] == [3, 1]


@pytest.fixture
def process_group(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(process_group, tmp_path):
    model = nn.parallel.DistributedDataParallel(trained(plain()))
    model(X).sum().backward()
    rw.save_adapter(model, tmp_path / "saved")
    assert keys(tmp_path / "saved") == KEYS
    other = loaded(nn.parallel.DistributedDataParallel(plain()), tmp_path / "saved")
    same(other, model)


@pytest.mark.filterwarnings("ignore")
def test_fully_sharded_parts(process_group, tmp_path):
    inner = trained(plain())
    inner[2] = FullyShardedDataParallel(
        inner[2], use_orig_params=True, device_id=torch.device("cpu")
    )
    model = compiled(inner)
    assert [layer.name for layer in rw.summary(model).layers] == ["0", "2"]
    with FullyShardedDataParallel.summon_full_params(model):
        rw.save_adapter(model, tmp_path / "saved")
    assert keys(tmp_path / "saved") == KEYS
    same(loaded(plain(), tmp_path / "saved"), trained(plain()))


def test_regions_compiled_by_accelerate(tmp_path):
    def build():
        return nn.ModuleDict({"blocks": nn.ModuleList([plain(), plain()]), "head": plain()})

    targets = r"blocks\.\d\.[02]"
    model = compile_regions(build(), backend="aot_eager")
    assert any("_orig_mod" in name for name, _ in model.named_modules())
    trained(model, target_modules=targets, modules_to_save=["head"])
    reference = trained(build(), target_modules=targets, modules_to_save=["head"])
    for name, this in (("wrapped", model), ("plain", reference)):
        rw.save_adapter(this, tmp_path / name)
    found, wanted = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("wrapped", "plain")
    )
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def with_prefix(folder, prefix: str) -> None:
    """What versions before this wrote under wrappers."""
    path, text = folder / "adapter_model.safetensors", (folder / "adapter_config.json").read_text()
    start = "base_model.model."
    tensors = {k.replace(start, start + prefix): v for k, v in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    config = json.loads(text)
    for field in ("rank_pattern", "alpha_pattern"):
        config[field] = {prefix + name: value for name, value in config[field].items()}
    config["modules_to_save"] = [prefix + name for name in config["modules_to_save"]]
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_a_folder_with_a_wrappers_parts_in_its_names_is_read(prefix, tmp_path):
    options = {"rank_pattern": {"2": 3}, "alpha_pattern": {"0": 2.0}, "modules_to_save": ["3"]}

    def build():
        return plain().append(nn.LayerNorm(8, dtype=torch.float64))

    reference = trained(build(), **options)
    rw.save_adapter(reference, tmp_path)
    with_prefix(tmp_path, prefix)
    assert f"base_model.model.{prefix}0.lora_A.weight" in keys(tmp_path)
    for model in (build(), compiled(build())):
        same(loaded(model, tmp_path), reference)


def test_a_model_with_such_a_part_of_its_own_keeps_it(tmp_path):
    model = nn.Sequential()
    model.add_module("module", plain())
    trained(nn.DataParallel(model), target_modules=["module.0", "module.2"])
    rw.save_adapter(model, tmp_path)
    assert keys(tmp_path) == {k.replace(".model.", ".model.module.") for k in KEYS}
    again = nn.Sequential()
    again.add_module("module", plain())
    same(loaded(nn.DataParallel(again), tmp_path), model)
