# Small models' folders, adapters over them, and what merging in Python makes of both.
import json

import peft
import torch
import transformers

import rankwise as rw

SIZES = dict(vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
             num_attention_heads=2)  # fmt: skip
BERT = dict(**SIZES, max_position_embeddings=32)
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def llama(folder, tied=False, dtype=torch.float32, **options):
    """Saves a random model; `options` are save_pretrained's."""
    config = transformers.LlamaConfig(
        **SIZES, num_key_value_heads=1, bos_token_id=0, eos_token_id=0, tie_word_embeddings=tied
    )
    model = transformers.LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder, **options)
    return folder


def bert(folder, kind=transformers.BertModel):
    kind(transformers.BertConfig(**BERT)).save_pretrained(folder)
    return folder


def randomise(model):
    """Every trainable value: adapters that add something."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)


def train(kind, folder, adapter, config):
    """Saves an adapter over the folder's model, as rankwise or PEFT would after a training."""
    model = kind.from_pretrained(folder)
    if isinstance(config, peft.PeftConfig):
        model = peft.get_peft_model(model, config)
        randomise(model)
        model.save_pretrained(adapter)
    else:
        randomise(rw.apply_lora(model, config))
        rw.save_adapter(model, adapter)
    return adapter


def merged_in_memory(kind, folder, adapter):
    """The reference: load, load the adapter, merge; the state dict."""
    model = kind.from_pretrained(folder)
    rw.load_adapter(model, adapter)
    rw.merge(model)
    return model.state_dict()


def same_bits(kind, output, wanted):
    found = kind.from_pretrained(output).state_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def edit_config(base, **values):
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
