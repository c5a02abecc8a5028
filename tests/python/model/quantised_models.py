"""Models whose linear layers bitsandbytes or torchao quantised."""

import bitsandbytes
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import rankwise as rw

WIDTH, LAYERS = 64, ["0", "2"]


def plain(dtype=torch.float32) -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)).to(dtype)


def by_bitsandbytes(model: nn.Sequential, kind: type, **options) -> nn.Sequential:
    for name in LAYERS:
        linear = model.get_submodule(name)
        quantised = kind(WIDTH, WIDTH, **options)
        quantised.load_state_dict(linear.state_dict(), strict=False)
        model.set_submodule(name, quantised)
    return model.to("cpu")  # the move quantises


def nf4(model):
    dtype = model[0].weight.dtype
    return by_bitsandbytes(model, bitsandbytes.nn.LinearNF4, compute_dtype=dtype)


def fp4(model):
    return by_bitsandbytes(model, bitsandbytes.nn.Linear4bit, quant_type="fp4")


def int8(model):
    return by_bitsandbytes(model, bitsandbytes.nn.Linear8bitLt, has_fp16_weights=False)


def int8_of_torchao(model):
    quantize_(model, Int8WeightOnlyConfig())
    return model


QUANTISED = [nf4, fp4, int8, int8_of_torchao]
LORA = rw.LoRAConfig(rank=4, target_modules=LAYERS)


def batch(seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


def adapted(quantise, config=LORA, dtype=torch.float32):
    model = rw.apply_lora(quantise(plain(dtype)), config)
    for name in LAYERS:
        nn.init.normal_(model.get_submodule(name).lora_B, std=0.1)
    return model
