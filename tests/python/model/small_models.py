# Small models with random weights, their inputs, and fingerprints: bits, identities, flags.
from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers
from tolerances import assert_same_bits
from torch import Tensor, nn

import rankwise as rw
from rankwise.adapted import Adapted

SIZE = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
QUIET = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def bert(**options) -> nn.Module:
    config = transformers.BertConfig(
        **SIZE, intermediate_size=24, max_position_embeddings=16, **{**QUIET, **options}
    )
    return transformers.BertModel(config)


def bert_classifier(**options) -> nn.Module:
    config = transformers.BertConfig(
        **SIZE, intermediate_size=24, max_position_embeddings=16, **{**QUIET, **options}
    )
    return transformers.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama(tied: bool = False) -> nn.Module:
    config = transformers.LlamaConfig(
        **SIZE, intermediate_size=24, tie_word_embeddings=tied, num_key_value_heads=1,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


BUILDERS = {
    "bert": bert,
    "bert_classifier": bert_classifier,
    "gpt2": gpt2,
    "llama": llama,
    "llama_tied": lambda: llama(tied=True),
    "t5": t5,
}


def inputs(model: nn.Module, seed: int = 3) -> dict[str, Tensor]:
    """Token indices [2, 7] (and labels' side for T5) for a transformers model."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, 40, (2, 7), generator=generator)
    if isinstance(model, transformers.T5ForConditionalGeneration):
        return {"input_ids": tokens, "decoder_input_ids": tokens[:, :5]}
    return {"input_ids": tokens}


def output(model: nn.Module, seed: int = 3) -> Tensor:
    """Logits, or the last hidden state."""
    return model(**inputs(model, seed))[0]


def loss(model: nn.Module, seed: int = 3) -> Tensor:
    """A scalar that every output counts in (a sum of squares would be constant after LayerNorm)."""
    found = output(model, seed)
    return (found * torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)).sum()


def adapted(model: nn.Module) -> dict[str, Adapted]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Adapted)}


def randomise(model: nn.Module, seed: int = 1, size: float = 0.2) -> nn.Module:
    """Gives the active adapter (also its whole modules) values that change the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(noise * size)
    return model


def deltas(model: nn.Module) -> dict[str, Tensor]:
    """{layer name: scaling * B diag(E) A in the layout of its weight, float64}."""
    found = {}
    for name, layer in adapted(model).items():
        if layer.lora_A is None:
            continue
        A, B = layer.lora_A.detach().double(), layer.lora_B.detach().double()
        delta = layer.scaling * (B @ A)
        found[name] = delta.t() if layer.transposed else delta
    return found


@dataclass
class Fingerprint:
    """All that a failed or undone call must leave as it was."""

    modules: dict[str, int]
    parameters: dict[str, int]
    trainable: dict[str, bool]
    training: dict[str, bool]
    state: dict[str, Tensor]
    attributes: set[str]


def fingerprint(model: nn.Module) -> Fingerprint:
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return Fingerprint(
        {name: id(m) for name, m in modules.items()},
        {name: id(p) for name, p in parameters.items()},
        {name: p.requires_grad for name, p in parameters.items()},
        {name: m.training for name, m in modules.items()},
        {name: value.detach().clone() for name, value in model.state_dict().items()},
        set(vars(model)),
    )


def assert_unchanged(model: nn.Module, before: Fingerprint) -> None:
    now = fingerprint(model)
    for part in ("modules", "parameters", "trainable", "training", "attributes"):
        assert getattr(now, part) == getattr(before, part), f"{part} changed"
    assert list(now.state) == list(before.state)
    for name, value in before.state.items():
        assert_same_bits(now.state[name], value, name)


def assert_base_bits(model: nn.Module, plain: dict[str, Tensor]) -> None:
    """Every tensor of the plain model's state is in the model, bit for bit."""
    state = model.state_dict()
    for name, value in plain.items():
        assert_same_bits(state[name], value, name)


def sequence() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


def small(**options) -> nn.Sequential:
    config = rw.LoRAConfig(rank=2, target_modules=["0", "2"], **options)
    return randomise(rw.apply_lora(sequence(), config))
