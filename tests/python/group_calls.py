"""How often layers of one input are computed together."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

OP = torch.ops.rankwise._lora_linear_group_forward.default


class GroupCalls(TorchDispatchMode):
    """Counts the operator's calls in a block."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is OP
        return function(*args, **(kwargs or {}))
