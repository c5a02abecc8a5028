# PEFT's own eager LoRA layer over given tensors: the yardstick of the accuracy and memory tests.
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear


def peft_layer(
    weight: torch.Tensor,
    bias: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
) -> PeftLinear:
    """A PEFT layer whose parameters have these values and dtypes; the base is frozen."""
    rank = lora_A.shape[0]
    base = torch.nn.Linear(
        weight.shape[1], weight.shape[0], dtype=weight.dtype, device=weight.device
    )
    base.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=scaling * rank, lora_dropout=dropout)
    layer = PeftLinear(base, "default", config=config, r=rank, lora_alpha=scaling * rank)
    layer.lora_A["default"].weight = torch.nn.Parameter(lora_A.detach().clone())
    layer.lora_B["default"].weight = torch.nn.Parameter(lora_B.detach().clone())
    with torch.no_grad():
        base.weight.copy_(weight)
        base.bias.copy_(bias)
    assert layer.scaling["default"] == scaling
    return layer
