# resize_token_embeddings under adapters: they follow, and new tokens start as the base's.
import copy

import pytest
import torch
from small_models import llama, randomise
from tolerances import assert_same_bits
from torch import nn

import rankwise as rw
from rankwise.config import AdaLoRAConfig, LoRAConfig

KEPT = torch.arange(28).view(4, 7)  # tokens that every size here has


def resizable(targets: list[str], whole: list[str] = ()) -> tuple[nn.Module, nn.Module]:
    """(plain Llama of 40 tokens, the same with a trained adapter "default" and another, "b")."""
    torch.manual_seed(2)
    plain = llama().eval()
    model = copy.deepcopy(plain)
    rw.apply_lora(model, LoRAConfig(rank=2, target_modules=targets, modules_to_save=whole))
    randomise(model)
    others = {"embed_tokens", "q_proj"} - set(whole)
    rw.add_adapter(model, "b", LoRAConfig(rank=3, target_modules=sorted(others)))
    return plain, model


def logits(model: nn.Module, tokens: torch.Tensor = KEPT) -> torch.Tensor:
    return model(tokens).logits.detach()


def resized_plain(plain: nn.Module, model: nn.Module, rows: int) -> nn.Module:
    """The plain model resized, with the base's random new rows of `model`."""
    plain = copy.deepcopy(plain)
    plain.resize_token_embeddings(rows)
    rw.activate_adapter(model, None)
    state = model.state_dict()
    plain.load_state_dict({key: state[key] for key in plain.state_dict()})
    rw.activate_adapter(model, "default")
    return plain


TARGETS = [["lm_head", "q_proj"], ["embed_tokens"], ["embed_tokens", "lm_head"]]


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("rows", [44, 36])
@pytest.mark.parametrize("state", ["plain", "merged", "disabled"])
@pytest.mark.parametrize("mean", [True, False])
def test_adapted_tokens_follow(tmp_path, targets, rows, state, mean):
    plain, model = resizable(targets)
    before = logits(model)
    disabled = rw.disable_adapters(model)
    if state == "merged":
        rw.merge(model)
    if state == "disabled":
        disabled.__enter__()
    model.resize_token_embeddings(rows, mean_resizing=mean)
    assert logits(model).shape[-1] == rows
    if state == "merged":
        rw.unmerge(model)
    if state == "disabled":
        disabled.__exit__(None, None, None)
    kept = min(rows, 40)
    torch.testing.assert_close(logits(model)[..., :kept], before[..., :kept])
    with rw.disable_adapters(model):
        torch.testing.assert_close(logits(model)[..., :kept], logits(plain)[..., :kept])
    rw.save_adapter(model, tmp_path)
    fresh = resized_plain(plain, model, rows)
    rw.load_adapter(fresh, tmp_path)
    every = torch.arange(rows).view(1, -1)
    assert_same_bits(logits(fresh, every), logits(model, every), "loaded again")


@pytest.mark.parametrize("targets", TARGETS)
def test_new_tokens_compute_the_base_until_they_are_trained(targets):
    plain, model = resizable(targets)
    model.resize_token_embeddings(44)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    new = torch.arange(40, 44)
    assert_same_bits(embedding(new).detach(), embedding.weight[new].detach(), "embedding")
    hidden = torch.randn(3, 16)
    base = hidden @ head.weight.detach().t()
    torch.testing.assert_close(head(hidden)[:, 40:].detach(), base[:, 40:])
    model(torch.arange(44).view(1, -1)).logits.square().sum().backward()
    assert rw.health_check(model).ok
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    for layer, found, of_base in (
        (embedding, embedding(new), embedding.weight[new]),
        (head, head(hidden)[:, 40:], base[:, 40:]),
    ):
        is_trained = not torch.allclose(found, of_base, atol=1e-5)
        assert is_trained == (getattr(layer, "adapter", None) == "default")


def test_the_layers_their_parameters_and_other_adapters_stay():
    _, model = resizable(["embed_tokens", "lm_head"])
    head, embedding = model.lm_head, model.model.embed_tokens
    factors = (head.lora_A, head.lora_B, embedding.lora_A, embedding.lora_B)
    model.resize_token_embeddings(44)
    assert model.lm_head is head and model.model.embed_tokens is embedding
    for before, now in zip(
        factors, (head.lora_A, head.lora_B, embedding.lora_A, embedding.lora_B), strict=True
    ):
        assert before is now and now.requires_grad
    assert head.out_features == 44 and not head.weight.requires_grad
    rw.activate_adapter(model, "b")
    assert embedding.lora_A.shape == (3, 44)
    logits(model, torch.arange(44).view(1, -1))


def test_the_head_of_a_new_size_keeps_its_triplets():
    torch.manual_seed(2)
    config = AdaLoRAConfig(initial_rank=3, target_rank=2, total_steps=9, target_modules=["lm_head"])
    model = randomise(rw.apply_lora(llama().eval(), config))
    before = logits(model)
    model.resize_token_embeddings(44)
    assert isinstance(model.lm_head, rw.nn.AdaLoRALinear)
    torch.testing.assert_close(logits(model)[..., :40], before)


def test_a_padding_row_beyond_the_new_size_is_forgotten():
    _, model = resizable(["embed_tokens"])
    model.model.embed_tokens.padding_idx = 39
    model.resize_token_embeddings(36)
    assert model.model.embed_tokens.padding_idx is None
    logits(model)


def test_a_larger_table_put_there_by_hand():
    _, model = resizable(["embed_tokens"])
    old = model.get_input_embeddings()
    before = old(KEPT).detach()
    new = nn.Embedding(44, 16)
    with torch.no_grad():
        new.weight[:40] = old.weight
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is old and old.num_embeddings == 44
    assert_same_bits(old(KEPT).detach(), before, "old tokens")


def test_another_table_put_there_by_hand_is_no_resized_one(tmp_path):
    _, model = resizable(["embed_tokens"])
    model.set_input_embeddings(nn.Embedding(44, 16))
    with pytest.raises(ValueError, match="'model.embed_tokens' is a Embedding now"):
        rw.save_adapter(model, tmp_path)


WHOLE = [(["q_proj"], ["lm_head", "embed_tokens"]), (["embed_tokens"], ["lm_head"]),
         (["lm_head"], ["embed_tokens"])]  # fmt: skip


@pytest.mark.parametrize("targets, whole", WHOLE)
@pytest.mark.parametrize("rows", [44, 36])
def test_tokens_trained_whole(tmp_path, targets, whole, rows):
    plain, model = resizable(targets, whole)
    before, kept = logits(model), min(rows, 40)
    model.resize_token_embeddings(rows)
    torch.testing.assert_close(logits(model)[..., :kept], before[..., :kept])
    for name in whole:
        module = model.lm_head if name == "lm_head" else model.model.embed_tokens
        assert module.weight.requires_grad and len(module.weight) == rows
    rw.save_adapter(model, tmp_path)
    wanted = logits(model, torch.arange(rows).view(1, -1))
    fresh = copy.deepcopy(plain)
    fresh.resize_token_embeddings(rows)
    with torch.no_grad():
        for mine, name in ((fresh.lm_head, "lm_head"), (fresh.model.embed_tokens, "embed_tokens")):
            if name not in whole:
                now = model.lm_head if name == "lm_head" else model.model.embed_tokens
                mine.weight.copy_(now.weight)
    rw.load_adapter(fresh, tmp_path)
    assert_same_bits(logits(fresh, torch.arange(rows).view(1, -1)), wanted, "loaded again")


@pytest.mark.parametrize("targets, whole", WHOLE)
def test_tokens_of_the_base_resized_while_the_adapters_wait_are_refused(targets, whole):
    _, model = resizable(targets, whole)
    rw.activate_adapter(model, "b")
    model.resize_token_embeddings(44)
    logits(model, torch.arange(44).view(1, -1))
    with pytest.raises(RuntimeError, match=rf"{whole[0]}.*replaced or resized while adapter 'def"):
        rw.activate_adapter(model, "default")
    rw.delete_adapter(model, "default")
    logits(model, torch.arange(44).view(1, -1))


def tied(whole: list[str]) -> nn.Module:
    torch.manual_seed(2)
    config = LoRAConfig(rank=2, target_modules=["q_proj"], modules_to_save=whole)
    return randomise(rw.apply_lora(llama(tied=True).eval(), config))


@pytest.mark.parametrize("rows", [44, 36])
def test_tied_ends_trained_whole_stay_one(tmp_path, rows):
    model = tied(["embed_tokens", "lm_head"])
    before, kept = logits(model), min(rows, 40)
    with rw.disable_adapters(model):
        base = logits(model)
    model.resize_token_embeddings(rows)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(logits(model)[..., :kept], before[..., :kept])
    with rw.disable_adapters(model):
        assert_same_bits(logits(model), base, "the base")
    rw.save_adapter(model, tmp_path)
    torch.manual_seed(2)
    fresh = llama(tied=True).eval()
    fresh.resize_token_embeddings(rows)
    rw.load_adapter(fresh, tmp_path)
    assert_same_bits(logits(fresh), logits(model), "loaded again")


def test_one_end_trained_whole_is_refused_after_it(tmp_path):
    """transformers ties the other end again, which was the base's and has the old size."""
    model = tied(["embed_tokens"])
    model.resize_token_embeddings(44)
    with pytest.raises(ValueError, match="lm_head.weight: tied to .* the vocabulary was resized"):
        rw.save_adapter(model, tmp_path)
    assert any("resized" in problem for problem in rw.health_check(model).problems)


@pytest.mark.parametrize("rows", [44, 36])
def test_adapted_tied_ends_of_a_folder(tmp_path, rows):
    _, untied = resizable(["embed_tokens", "lm_head"])
    rw.save_adapter(untied, tmp_path)
    model = llama(tied=True).eval()
    rw.load_adapter(model, tmp_path)
    before, kept = logits(model), min(rows, 40)
    model.resize_token_embeddings(rows)
    torch.testing.assert_close(logits(model)[..., :kept], before[..., :kept])
    head, embedding = model.lm_head, model.model.embed_tokens
    assert head.weight is embedding.weight and head.lora_B.shape == (rows, 2)
    factors = (head.lora_A, head.lora_B, embedding.lora_A, embedding.lora_B)
    assert all(factor.requires_grad for factor in factors)
    after = logits(model)
    rw.merge(model)
    rw.unmerge(model)
    rw.activate_adapter(model, None)
    rw.activate_adapter(model, "default")
    assert_same_bits(logits(model), after, "merged and unmerged, switched off and on")
