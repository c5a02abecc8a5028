# Modules trained whole in float32 over a 16-bit base, which callers need not know of.
import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file
from small_models import assert_base_bits, bert_classifier, inputs, llama, output, randomise
from tolerances import assert_same_bits
from torch import nn

import rankwise as rw
from rankwise.config import LoRAConfig

CASES = {
    "head": (bert_classifier, ["query"], ["classifier"]),
    "embeddings": (bert_classifier, ["query"], ["word_embeddings", "LayerNorm", "pooler"]),
    "block": (bert_classifier, ["query"], ["layer.1"]),
    "llama": (llama, ["q_proj"], ["embed_tokens", "lm_head", "norm"]),
    "tied": (lambda: llama(tied=True), ["q_proj"], ["embed_tokens", "lm_head"]),
    "tied to the base's": (lambda: llama(tied=True), ["q_proj"], ["embed_tokens"]),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(params=[torch.float16, torch.bfloat16])
def models(request, case) -> tuple[nn.Module, nn.Module]:
    """(plain 16-bit model, the same with trained masters)."""
    build, targets, whole = case
    torch.manual_seed(0)
    plain = build().to(request.param).eval()
    config = LoRAConfig(
        rank=2, target_modules=targets, modules_to_save=whole, adapter_dtype=torch.float32
    )
    model = rw.apply_lora(copy.deepcopy(plain), config)
    assert_same_bits(output(model).detach(), output(plain).detach(), "before training")
    return plain, randomise(model, size=0.05)


def dtypes(model: nn.Module) -> set[torch.dtype]:
    return {p.dtype for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("autocast", [False, True])
def test_a_grad_scaler_takes_them(models, autocast):
    plain, model = models
    assert dtypes(model) == {torch.float32}
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with torch.autocast("cpu", output(plain).dtype, enabled=autocast):
        found = output(model)
        assert found.dtype == output(plain).dtype
    scaler.scale(found.float().square().sum()).backward()
    assert rw.health_check(model).ok
    scaler.step(optimizer)
    after = [p for p in model.parameters() if p.requires_grad]
    assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_the_base_stays_as_it_was(models):
    plain, model = models
    wanted = output(model).detach()
    with rw.disable_adapters(model):
        assert_same_bits(output(model).detach(), output(plain).detach(), "disabled")
    rw.activate_adapter(model, None)
    assert_base_bits(model, plain.state_dict())
    rw.activate_adapter(model, "default")
    assert_same_bits(output(model).detach(), wanted, "active again")
    assert dtypes(model) == {torch.float32}


def test_saved_and_loaded_as_float32(models, tmp_path):
    plain, model = models
    rw.save_adapter(model, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    rw.load_adapter(plain, tmp_path)
    assert dtypes(plain) == {torch.float32}
    assert_same_bits(output(plain).detach(), output(model).detach(), "loaded again")


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(models, twin_of):
    plain, model = models
    twin = twin_of(model)
    assert_same_bits(output(twin).detach(), output(model).detach(), "copy")
    with rw.disable_adapters(twin):
        assert_same_bits(output(twin).detach(), output(plain).detach(), "its base")


@pytest.mark.parametrize("how", ["unmerged", "merged", "deleted"])
def test_without_adapters_the_model_is_plain_again(models, how):
    plain, model = models
    wanted = output(model).detach() if how == "merged" else output(plain).detach()
    if how == "merged":
        rw.merge(model)
    rw.delete_adapter(model, "default") if how == "deleted" else rw.unload(model)
    assert {p.dtype for p in model.parameters()} == {output(plain).dtype}
    assert dict(model.named_buffers()).keys() == dict(plain.named_buffers()).keys()
    if how == "deleted":
        assert_same_bits(output(model).detach(), wanted, "output")
        return
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    torch.testing.assert_close(output(model).detach(), wanted, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("active", ["default", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_move_to_another_dtype_reaches_what_waits(models, active, dtype):
    plain, model = models
    own = output(plain).dtype
    rw.activate_adapter(model, active)
    model.to(dtype)
    for name in ("default", None, "default"):
        rw.activate_adapter(model, name)
        assert output(model).dtype == dtype
    rw.activate_adapter(model, None)
    assert_base_bits(model, plain.to(dtype).state_dict())
    if dtype != own:
        assert {p.dtype for p in model.parameters()} == {dtype}


def test_compiled_without_a_break(models):
    _, model = models
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    found = compiled(**inputs(model))[0]
    assert_same_bits(found.detach(), output(model).detach(), "compiled")


def test_a_weight_tied_to_a_master_since_leaves_the_bases_its_dtype():
    plain = llama(tied=True).half().eval()
    config = LoRAConfig(
        target_modules=["q_proj"], modules_to_save=["embed_tokens"], adapter_dtype=torch.float32
    )
    model = randomise(rw.apply_lora(copy.deepcopy(plain), config), size=0.05)
    wanted = output(model).detach()
    model.tie_weights()
    assert any("tied to" in problem for problem in rw.health_check(model).problems)
    rw.activate_adapter(model, "default")
    assert_same_bits(output(model).detach(), wanted, "put right")
    rw.activate_adapter(model, None)
    assert_base_bits(model, plain.state_dict())


def plain_head(dtype: torch.dtype, **options) -> nn.Module:
    config = LoRAConfig(rank=2, target_modules=["query"], modules_to_save=["classifier"], **options)
    return rw.apply_lora(bert_classifier().to(dtype), config)


def test_a_head_put_there_later_is_a_master_too(tmp_path):
    for head in (nn.Linear(16, 5), nn.Linear(16, 5, dtype=torch.float16)):
        model = plain_head(torch.float16, adapter_dtype=torch.float32)
        model.classifier = head
        assert output(model).dtype == torch.float16 and output(model).shape == (2, 5)
        assert dtypes(model) == {torch.float32}
        rw.save_adapter(model, tmp_path)


def test_without_asking_they_are_the_bases():
    assert {p.dtype for p in plain_head(torch.bfloat16).classifier.parameters()} == {torch.bfloat16}
    assert dtypes(plain_head(torch.bfloat16, adapter_dtype=torch.bfloat16)) == {torch.bfloat16}
    assert dtypes(plain_head(torch.float32, adapter_dtype=torch.float32)) == {torch.float32}


def test_health_when_the_model_was_rounded_later():
    model = plain_head(torch.bfloat16, adapter_dtype=torch.float32).half()
    problems = rw.health_check(model).problems
    assert "classifier.weight: torch.float16, but torch.float32 was asked for" in problems


class Mixed(nn.Module):
    """Own 16-bit parameters above a normalisation in float32, as transformers keeps some."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6, dtype=torch.bfloat16))
        self.norm = nn.LayerNorm(6, dtype=torch.float32)

    def forward(self, x, *, extra):
        return [self.norm((x * self.scale + extra[0]).float()), {"x": x * self.scale}]


def test_a_module_of_two_dtypes_takes_and_gives_nested_tensors():
    model = nn.ModuleDict({"body": nn.Linear(6, 6, dtype=torch.bfloat16), "head": Mixed()})
    plain = copy.deepcopy(model)
    rw.apply_lora(
        model,
        LoRAConfig(target_modules=["body"], modules_to_save=["head"], adapter_dtype=torch.float32),
    )
    x = torch.randn(2, 6, dtype=torch.bfloat16)
    found, wanted = model["head"](x, extra=(x,)), plain["head"](x, extra=(x,))
    assert found[1]["x"].dtype == wanted[1]["x"].dtype == torch.bfloat16
    torch.testing.assert_close(found[0].float(), wanted[0], rtol=0.02, atol=0.02)
    rw.activate_adapter(model, None)
    assert_base_bits(model, plain.state_dict())
