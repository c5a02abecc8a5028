"""Layers with a low-rank adapter: drop-in for nn.Linear and nn.Embedding.

``weight`` and ``bias`` are the base's, under their own names; the active adapter's factors are
``lora_A [capacity, in]``, ``lora_B [out, capacity]`` and, in AdaLoRA, ``lora_E [capacity, 1]``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import ops
from .adapted import Adapted, StoredAdapter
from .computed import not_a_parameter, tensors_of
from .config import AdapterOptions
from .devices import FACTORS
from .linear_group import LoRALinearGroup
from .quantised import is_quantised, over
from .resized import Rows
from .sharding import ADD_BEFORE, check_no_dtensor
from .stand_in import stand_in

_PLAIN = {Tensor, nn.Parameter, type(None)}
_TENSOR_PARALLEL = (
    "tensor-parallel layers have no adapters: leave them out of the plan (parallelize_module, "
    "tp_plan) or out of target_modules; under fully_shard call the module that it was given, "
    "not a layer in it"
)

__all__ = ["AdaLoRALinear", "LoRAEmbedding", "LoRALinear", "LoRALinearGroup"]


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight is stored [in, out]; known by name to import nothing."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def is_adaptable(module: nn.Module) -> bool:
    """Whether an adapter can stand in for this module.

    Only the exact types: a subclass may compute something else, or have its weight read past its
    forward (the output projection of nn.MultiheadAttention).
    """
    plain = type(module) in (nn.Linear, nn.Embedding)
    return plain or _is_conv1d(module) or is_quantised(module)


class LoRALinear(Adapted, nn.Linear):
    """``y = x W0^T + b + scaling * (drop(x) A^T) B^T`` with W0 and b frozen.

    Args:
        in_features, out_features, bias, device, dtype: as nn.Linear.
        rank, alpha, dropout, rslora, init, capacity: see AdapterOptions.
        adapter_dtype: of the factors; None for float32 over a 16-bit weight, else the weight's.

    Input ``[..., in_features]``, output ``[..., out_features]`` in the input's dtype.
    """

    _triplets = False
    _plain_class = nn.Linear
    out_features = Rows()

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        rslora: bool = False,
        init: str | None = None,
        capacity: int | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        options = AdapterOptions(
            rank, alpha, dropout, rslora, init, capacity, adapter_dtype, self._triplets
        )
        self._become_adapted(transposed=False)
        self._freeze_and_add(options)

    @classmethod
    def from_linear(cls, linear: nn.Module, **options) -> LoRALinear:
        """A layer around an nn.Linear or a transformers Conv1D, sharing its parameters and hooks.

        The parameters are the same objects (so tied weights stay tied) and are frozen. A Conv1D's
        weight keeps its [in, out] layout. Keyword arguments as AdapterOptions.
        """
        if not (type(linear) is nn.Linear or _is_conv1d(linear)):
            raise TypeError(
                f"{cls.__name__}.from_linear: linear must be an nn.Linear or a transformers "
                f"Conv1D, got {type(linear).__name__}"
            )
        layer = cls._around(linear)
        layer._freeze_and_add(AdapterOptions(**options, triplets=cls._triplets))
        return layer

    @classmethod
    def _around(cls, linear: nn.Module) -> LoRALinear:
        layer = _with_state_of(linear, cls)
        if _is_conv1d(linear):
            layer._plain_class = type(linear)
            layer.in_features, layer.out_features = linear.weight.shape
        layer._become_adapted(transposed=_is_conv1d(linear))
        return layer

    @property
    def _sizes(self) -> tuple[int, int]:
        return self.in_features, self.out_features

    def forward(self, input: Tensor) -> Tensor:
        if self.shared_input is not None:
            output = self.shared_input.output_of(self, input)
            if output is not None:
                return output
        self._check_trainable()
        if not self.adapter_in_use:
            return F.linear(input, self._matrix(self._weight_in_use()), self.bias)
        _check_plain(self, input)
        weight, bias, E = tensors_of(self, "weight", "bias", "lora_E")
        A, B, rank = self._update()
        return ops.lora_linear(
            input,
            self._matrix(weight),
            bias,
            A,
            B,
            E,
            scaling=self.scaling,
            dropout_p=self.dropout if self.training else 0.0,
            rank=rank,
        )

    _grouped_forward = forward  # what LoRALinearGroup computes for several layers

    def extra_repr(self) -> str:
        return f"{nn.Linear.extra_repr(self)}, {self._adapter_repr()}"


class AdaLoRALinear(LoRALinear):
    """``y = x W0^T + b + scaling * ((drop(x) A^T) * E^T) B^T``: AdaLoRA (arXiv 2303.10512).

    A and B start normal with standard deviation 0.02, E zero, as in the paper's code; ``init`` is
    not used. The scaling stays alpha / (initial) rank when a RankAllocator prunes directions.
    """

    _triplets = True


class LoRAEmbedding(Adapted, nn.Embedding):
    """``y[i] = W0[i] + scaling * A^T[i] B^T`` with W0 ``[num_embeddings, embedding_dim]`` frozen.

    ``lora_A [rank, num_embeddings]``, ``lora_B [embedding_dim, rank]``; no dropout. The default
    initialisation is "swapped", as in the paper's code: A zero, so that rows never seen keep W0.

    Args:
        num_embeddings, embedding_dim, padding_idx, device, dtype: as nn.Embedding.
        rank, alpha, rslora, init, capacity, adapter_dtype: as LoRALinear.
    """

    _plain_class = nn.Embedding
    num_embeddings = Rows()

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        rslora: bool = False,
        init: str | None = None,
        capacity: int | None = None,
        adapter_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Embedding.__init__(
            self, num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype
        )
        options = AdapterOptions(rank, alpha, 0.0, rslora, init, capacity, adapter_dtype)
        self._become_adapted(transposed=True)
        self._freeze_and_add(options)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, **options) -> LoRAEmbedding:
        """A layer around an nn.Embedding, sharing its parameter; arguments as AdapterOptions."""
        if type(embedding) is not nn.Embedding:
            raise TypeError(
                f"{cls.__name__}.from_embedding: embedding must be an nn.Embedding, "
                f"got {type(embedding).__name__}"
            )
        if "dropout" in options:
            raise TypeError(f"{cls.__name__}.from_embedding: an embedding has no dropout")
        layer = cls._around(embedding)
        layer._freeze_and_add(AdapterOptions(**options))
        return layer

    @classmethod
    def _around(cls, embedding: nn.Embedding) -> LoRAEmbedding:
        for name in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(embedding, name):
                raise ValueError(f"{cls.__name__}: an embedding with {name} is not supported")
        layer = _with_state_of(embedding, cls)
        layer._become_adapted(transposed=True)
        return layer

    @property
    def dropout(self) -> float:
        """0: indices cannot be dropped."""
        return 0.0

    @property
    def _sizes(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def new_adapter(self, options: AdapterOptions) -> StoredAdapter:
        if options.triplets:
            raise ValueError("an embedding takes no AdaLoRA adapter; adapt linear layers")
        return super().new_adapter(options)

    def _initialise(self, A: Tensor, B: Tensor, options: AdapterOptions) -> None:
        if options.init in (None, "swapped"):  # as loralib: unit variance
            B.normal_()
        else:
            super()._initialise(A, B, options)

    def forward(self, input: Tensor) -> Tensor:
        self._check_trainable()
        if not self.adapter_in_use:
            return F.embedding(input, self._weight_in_use(), self.padding_idx)
        _check_plain(self, input)
        weight, A, B, E = tensors_of(self, "weight", *FACTORS)
        return ops.lora_embedding(
            input,
            weight,
            A,
            B,
            E,
            scaling=self.scaling,
            padding_idx=self.padding_idx,
            rank=self.rank,
        )

    def extra_repr(self) -> str:
        return f"{nn.Embedding.extra_repr(self)}, {self._adapter_repr()}"


def adapt(module: nn.Module, options: AdapterOptions) -> Adapted:
    """The adapted layer for an adaptable module, sharing its parameters, without adapters yet."""
    check_no_dtensor("adapter", {"weight": module._parameters.get("weight")}, ADD_BEFORE)
    if isinstance(module, nn.Embedding):
        return LoRAEmbedding._around(module)
    if is_quantised(module):
        return _with_state_of(module, over(type(module), options.triplets)).become_adapted(module)
    kind = AdaLoRALinear if options.triplets else LoRALinear
    return kind._around(module)


def _check_plain(layer: Adapted, input: Tensor) -> None:
    """Refuses DTensors, for which the operators have no rule of sharding."""
    if torch.compiler.is_compiling():
        return
    own = layer._parameters
    weight, factor = own.get("weight"), own.get("lora_A")
    if type(input) in _PLAIN and type(weight) in _PLAIN and type(factor) in _PLAIN:
        return  # the common case
    held = {"input": input, "weight": weight, "lora_A": factor}
    check_no_dtensor(type(layer).__name__, held, _TENSOR_PARALLEL)


def _with_state_of(module: nn.Module, cls: type) -> nn.Module:
    """A module of `cls` with the parameters, hooks and attributes of `module`."""
    if "forward" in vars(module):
        raise TypeError(
            f"{cls.__name__}: the {type(module).__name__}'s forward was replaced on the instance "
            "(by a hook of accelerate, for example); add adapters before that"
        )
    found = not_a_parameter(module, "weight")
    if found is not None:
        raise TypeError(f"{cls.__name__}: the {type(module).__name__}'s {found}")
    return stand_in(module, cls)
