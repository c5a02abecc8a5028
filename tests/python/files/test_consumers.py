# What others make of exported folders: transformers, diffusers, by their rules vLLM, llama.cpp.
import json
import math
import warnings
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from file_models import IDS, layers_of, prune, randomise
from safetensors.torch import load_file
from torch import Tensor, nn

import rankwise as rw

PREFIX = "base_model.model."


def llama() -> nn.Module:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double().eval()


def lora(**options) -> nn.Module:
    targets = ["q_proj", "v_proj", "down_proj"]
    config = rw.LoRAConfig(**dict(rank=4, alpha=6.0, target_modules=targets) | options)
    model = rw.apply_lora(llama(), config)
    randomise(model)
    return model


def adalora(ranks=()) -> nn.Module:
    config = rw.AdaLoRAConfig(
        initial_rank=5, target_rank=2, total_steps=9, target_modules=["q_proj", "up_proj"]
    )
    model = rw.apply_lora(llama(), config)
    randomise(model, std=0.4)
    for layer, rank in zip(layers_of(model).values(), ranks, strict=False):
        prune(layer, rank)
    return model


MODELS = {
    "lora": lora,
    "patterns": lambda: lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3.0}),
    "rslora": lambda: lora(rslora=True),
    "adalora": adalora,
    "adalora pruned": lambda: adalora((3, 0, 5, 1)),
}


@pytest.fixture(params=MODELS)
def model(request) -> nn.Module:
    return MODELS[request.param]()


def read(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


def pairs(tensors: dict[str, Tensor], what: str) -> dict[str, tuple[Tensor, Tensor]]:
    """{module: (A, B)}; every name must be a factor's."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, factor = name.removesuffix(".weight").rpartition(".")
        if factor not in ("lora_A", "lora_B") or not name.startswith(PREFIX):
            raise ValueError(f"{what}: unexpected name {name}")
        found.setdefault(module.removeprefix(PREFIX), {})[factor] = tensor
    return {module: (own["lora_A"], own["lora_B"]) for module, own in found.items()}


def vllm(folder: Path) -> dict[str, Tensor]:
    """{module: update} as vLLM computes it: one rank at most, one scale for all modules."""
    config, tensors = read(folder)
    for name in ("r", "lora_alpha", "target_modules"):
        if config.get(name) is None:
            raise ValueError(f"vLLM: {name} is missing")
    if config.get("modules_to_save") or config.get("use_dora") or config["bias"] != "none":
        raise ValueError("vLLM: modules_to_save, DoRA and bias are refused")
    root = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    updates = {}
    for module, (A, B) in pairs(tensors, "vLLM").items():
        if A.shape[0] > config["r"]:
            raise ValueError("vLLM: a rank above r")
        updates[module] = config["lora_alpha"] / root * (B @ A)
    targets = config["target_modules"]
    assert all(module.rpartition(".")[2] in targets or module in targets for module in updates)
    return updates


def llama_cpp(folder: Path) -> dict[str, Tensor]:
    """{module: update} of the converted adapter: scaled by alpha over each tensor's own rank."""
    config, tensors = read(folder)
    if "base_model_name_or_path" not in config:
        raise ValueError("llama.cpp: base_model_name_or_path is missing")
    alpha = float(config["lora_alpha"])
    found = pairs(tensors, "llama.cpp")
    return {module: alpha / A.shape[0] * (B @ A) for module, (A, B) in found.items()}


def updates_of(model: nn.Module) -> dict[str, Tensor]:
    """What the adapter adds to the weights, by definition."""
    found = {}
    for name, layer in layers_of(model).items():
        A, B = layer.lora_A[: layer.rank].detach(), layer.lora_B[:, : layer.rank].detach()
        if layer.lora_E is not None:
            A = A * layer.lora_E[: layer.rank].detach()
        if layer.rank > 0:
            found[name] = layer.scaling * (B @ A)
    return found


@pytest.mark.parametrize("consumer", [vllm, llama_cpp])
def test_they_compute_what_the_model_computes(tmp_path, model, consumer):
    rw.export_lora(model, tmp_path)
    found, wanted = consumer(tmp_path), updates_of(model)
    assert found.keys() == wanted.keys()
    for name, update in wanted.items():
        torch.testing.assert_close(found[name], update, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("consumer", [vllm, llama_cpp])
def test_what_needs_an_export_is_refused_or_another_function(tmp_path, consumer):
    rw.save_adapter(adalora(), tmp_path / "adalora")
    with pytest.raises(ValueError, match="is missing|unexpected name .*lora_E"):
        consumer(tmp_path / "adalora")
    model = lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3.0})
    rw.save_adapter(model, tmp_path / "patterns")
    found, wanted = consumer(tmp_path / "patterns"), updates_of(model)
    assert any(not torch.allclose(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("consumer", [vllm, llama_cpp])
def test_modules_trained_whole_are_told_of(tmp_path, consumer):
    with pytest.warns(UserWarning, match="vLLM and llama.cpp's conversion stop there"):
        rw.export_lora(lora(modules_to_save=["lm_head"]), tmp_path)
    with pytest.raises(ValueError, match="modules_to_save|unexpected name"):
        consumer(tmp_path)


def by_transformers(folder: Path) -> nn.Module:
    theirs = llama()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about layers that were pruned away
        theirs.load_adapter(folder)
    return theirs.double()


@pytest.mark.parametrize("write", [rw.save_adapter, rw.export_lora])
@pytest.mark.parametrize("name", MODELS)
def test_transformers_load_adapter(tmp_path, name, write):
    model = MODELS[name]()
    write(model, tmp_path)
    if (name, write) == ("adalora pruned", rw.save_adapter):  # as of PEFT's own such folders
        with pytest.raises(RuntimeError, match="mismatch"):
            by_transformers(tmp_path)
        return
    with torch.no_grad():
        found, wanted, plain = (m(IDS).logits for m in (by_transformers(tmp_path), model, llama()))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert (wanted - plain).abs().max() > 1e-3


def unet() -> nn.Module:
    torch.manual_seed(2)
    blocks = dict(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8,
        cross_attention_dim=8, attention_head_dim=4, **blocks,
    ).eval()  # fmt: skip


@pytest.mark.parametrize(
    "options", [{}, {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_v": 3.0}}]
)
def test_diffusers(tmp_path, options):
    """Its own loader, told the prefix of PEFT's folders and their configuration."""
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model = rw.apply_lora(
        unet(), rw.LoRAConfig(rank=4, alpha=6.0, target_modules=targets, **options)
    )
    randomise(model)
    rw.export_lora(model, tmp_path)
    theirs = unet()
    prefix = PREFIX.removesuffix(".")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    theirs.load_lora_adapter(
        str(tmp_path), prefix=prefix, weight_name="adapter_model.safetensors",
        metadata={f"{prefix}.{key}": value for key, value in config.items()},
    )  # fmt: skip
    inputs = (torch.randn(1, 4, 8, 8), 3, torch.randn(1, 3, 8))
    with torch.no_grad():
        found, wanted, plain = (m(*inputs).sample for m in (theirs, model, unet()))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert (wanted - plain).abs().max() > 1e-2
