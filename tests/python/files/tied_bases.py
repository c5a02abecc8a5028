"""Models whose vocabularies are tied in different ways."""

import torch
import transformers

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(tied: bool, seed: int = 1) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        **SIZES, intermediate_size=24, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0
    )
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> torch.nn.Module:
    torch.manual_seed(1)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40}
    config = transformers.GPT2Config(bos_token_id=0, eos_token_id=0, **sizes)
    return transformers.GPT2LMHeadModel(config).eval()


def bert() -> torch.nn.Module:
    torch.manual_seed(1)
    config = transformers.BertConfig(**SIZES, intermediate_size=24)
    return transformers.BertForMaskedLM(config).eval()


class T5(torch.nn.Module):
    """T5 with one input for both sides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1}
        ends = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
        config = transformers.T5Config(num_heads=2, dropout_rate=0.0, **sizes, **ends)
        self.t5 = transformers.T5ForConditionalGeneration(config)
        self.config = self.t5.config

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.t5.shared

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.t5.lm_head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.t5(input_ids=ids, decoder_input_ids=ids)


BASES = {
    "llama": lambda: llama(False),
    "tied llama": lambda: llama(True),
    "gpt2": gpt2,
    "bert": bert,
    "t5": lambda: T5().eval(),
}
