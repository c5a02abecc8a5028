"""PEFT's layers over quantised bases with our operators: the base's product keeps its own code.

Imported where such a layer is met, for PEFT's modules import the libraries.
"""

from __future__ import annotations

from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners.lora import torchao

from .layers import FUSED
from .products import FusedModules, FusedTriplets


class TorchaoLoraLinear(FusedModules, torchao.TorchaoLoraLinear):
    pass


FUSED[torchao.TorchaoLoraLinear] = TorchaoLoraLinear

if is_bnb_available():
    from peft.tuners.adalora import bnb as adalora_bnb
    from peft.tuners.lora import bnb as lora_bnb

    class Linear8bitLt(FusedModules, lora_bnb.Linear8bitLt):
        pass

    class SVDLinear8bitLt(FusedTriplets, adalora_bnb.SVDLinear8bitLt):
        pass

    FUSED[lora_bnb.Linear8bitLt] = Linear8bitLt
    FUSED[adalora_bnb.SVDLinear8bitLt] = SVDLinear8bitLt

if is_bnb_4bit_available():

    class Linear4bit(FusedModules, lora_bnb.Linear4bit):
        pass

    class SVDLinear4bit(FusedTriplets, adalora_bnb.SVDLinear4bit):
        pass

    FUSED[lora_bnb.Linear4bit] = Linear4bit
    FUSED[adalora_bnb.SVDLinear4bit] = SVDLinear4bit
