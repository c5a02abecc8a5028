# What "all-linear" leaves out is told by name, once, and nothing is told where all is reached.
import re
import warnings

import pytest
import torch
import transformers
from small_models import SIZE, bert, bert_classifier, gpt2, llama, t5
from torch import nn

import rankwise as rw

MOE = dict(**SIZE, intermediate_size=24, num_key_value_heads=1)
VISION = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
    image_size=224, patch_size=16,
)  # fmt: skip


def mixtral(**options) -> nn.Module:
    config = transformers.MixtralConfig(**{**MOE, **options}, num_local_experts=4)
    return transformers.MixtralForCausalLM(config)


def qwen() -> nn.Module:
    config = transformers.Qwen3MoeConfig(**MOE, num_experts=4, moe_intermediate_size=24, head_dim=8)
    return transformers.Qwen3MoeForCausalLM(config)


def gpt_oss() -> nn.Module:
    config = transformers.GptOssConfig(**MOE, num_local_experts=4, head_dim=8)
    return transformers.GptOssForCausalLM(config)


def dbrx() -> nn.Module:
    """Whose experts' matrices lie below each other in one."""
    config = transformers.DbrxConfig(
        d_model=16, n_heads=2, n_layers=2, max_seq_len=16, vocab_size=40,
        attn_config={"kv_n_heads": 1, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    )  # fmt: skip
    return transformers.DbrxForCausalLM(config)


def whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def wav2vec2() -> nn.Module:
    """With a convolution under weight_norm."""
    config = transformers.Wav2Vec2Config(
        **SIZE, intermediate_size=24, conv_dim=(16, 16), conv_stride=(2, 2), conv_kernel=(3, 3),
        num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    return transformers.Wav2Vec2Model(config)


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm([4, 6, 6]), nn.Linear(6, 6))


class Stack(nn.Module):
    """A user's own experts."""

    def __init__(self, count: int = 4):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(count, 8, 8))
        self.linear = nn.Linear(8, 8)


def told(model: nn.Module, **options) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = rw.LoRAConfig(**{"rank": 2, "target_modules": "all-linear", **options})
        rw.apply_lora(model, config)
    ours = [x for x in caught if "all-linear" in str(x.message)]
    assert all(x.filename == __file__ for x in ours)
    return [str(x.message) for x in ours]


EXPERTS = {
    mixtral: "model.layers.*.mlp.experts: 3-D parameters gate_up_proj, down_proj, 75%",
    qwen: "model.layers.*.mlp.experts: 3-D parameters gate_up_proj, down_proj, 75%",
    gpt_oss: "model.layers.*.mlp.experts: 3-D parameters gate_up_proj, down_proj, 72%",
    dbrx: "transformer.blocks.*.ffn.experts.mlp: 2-D parameters w1, v1, w2, 75%",
    Stack: "the model: 3-D parameters experts, 78%",
}


@pytest.mark.parametrize("build", EXPERTS, ids=lambda build: build.__name__)
def test_fused_experts_are_told_once_by_name_and_share(build):
    (message,) = told(build())
    assert message.endswith(": " + EXPERTS[build])


QUIET = [bert, bert_classifier, gpt2, llama, t5, whisper, wav2vec2, convolutions]


@pytest.mark.parametrize("build", QUIET, ids=lambda build: build.__name__)
def test_no_false_alarm(build):
    assert told(build()) == []


@pytest.mark.parametrize("name", ["ViT", "CLIPVision", "Dinov2", "SiglipVision"])
def test_positions_and_class_tokens_are_no_experts(name):
    config = getattr(transformers, f"{name}Config")(**VISION)
    messages = told(getattr(transformers, f"{name}Model")(config))
    assert not any(re.search("embed|token", message) for message in messages)


def test_experts_count_however_large_the_vocabulary_is():
    (message,) = told(mixtral(vocab_size=32000))
    assert "mlp.experts: 3-D parameters gate_up_proj, down_proj, 1%" in message


@pytest.mark.parametrize("build", [
    lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24), 2),
    lambda: nn.Sequential(nn.Linear(8, 8), nn.LSTM(8, 8)),
    lambda: nn.Sequential(
        nn.Linear(8, 8), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    ),
], ids=["attention", "lstm", "parametrised"])  # fmt: skip
def test_torchs_own_products_that_get_no_adapter_are_told(build):
    (message,) = told(build())
    assert re.search("self_attn: 2-D parameters in_proj_weight|weight_ih_l0|: 2-D param.* weight,",
                     message)  # fmt: skip


@pytest.mark.parametrize("options", [
    {"exclude_modules": ["experts"]},
    {"target_modules": ["q_proj"]},
    {"target_modules": ".*q_proj"},
], ids=str)  # fmt: skip
def test_who_does_not_ask_for_them_is_told_nothing(options):
    assert told(mixtral(), **options) == []


def test_experts_trained_whole_are_not_left_out():
    config = rw.LoRAConfig(target_modules="all-linear", modules_to_save=["mlp.experts"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rw.apply_lora(mixtral(), config)


def test_an_adapter_added_later_and_adalora_tell_too():
    model = mixtral()
    config = rw.AdaLoRAConfig(target_modules="all-linear", total_steps=10)
    with pytest.warns(UserWarning, match="all-linear.*mlp.experts"):
        rw.apply_lora(model, config)
    with pytest.warns(UserWarning, match="all-linear.*mlp.experts"):
        rw.add_adapter(model, "other", config)
