"""The operators. Shapes, dtypes and formulas; the implementations are C++ (csrc/ops)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._library import library as _library  # registers the ops

_ops = torch.ops.rankwise


def _is_jagged(operator: str, name: str, tensor: Tensor) -> bool:
    """Whether a tensor is PyTorch's nested one of Python's; refuses its masked one."""
    if type(tensor) is Tensor:
        return False
    if torch.masked.is_masked_tensor(tensor):
        raise TypeError(
            f"{operator}: {name} must be a plain tensor, got a MaskedTensor; pass its get_data()"
        )
    return tensor.is_nested and tensor.layout is torch.jagged


def _over_values(operator: Callable[[Tensor], Tensor], nested: Tensor) -> Tensor:
    """The operator over all components' rows at once, nested as they were."""
    values = operator(nested.values())
    return torch.nested.nested_tensor_from_jagged(
        values, nested.offsets(), nested.lengths(), jagged_dim=nested._ragged_idx
    )


def lora_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    lora_E: Tensor | None = None,
    *,
    scaling: float,
    dropout_p: float = 0.0,
    rank: int | None = None,
) -> Tensor:
    """A linear layer with a low-rank update, as one differentiable op.

    ``y = x W0^T + bias + scaling * ((drop(x) A^T) * E^T) B^T`` (LoRA, arXiv 2106.09685; with E the
    triplets of AdaLoRA, arXiv 2303.10512).

    Args:
        input: ``[..., in]``; any leading dimensions and strides, also ``[in]`` and empty batches;
            or a nested tensor of such.
        weight: W0 ``[out, in]``, any strides (pass ``conv1d.weight.t()`` for GPT-2's layout).
        bias: ``[out]`` or None.
        lora_A: ``[capacity, in]``.
        lora_B: ``[out, capacity]``.
        lora_E: ``[capacity, 1]`` or None for ones.
        scaling: factor of the update, finite; usually alpha / rank.
        dropout_p: probability in [0, 1], quantised to 1/65536, of dropping an element of the
            adapter's input. The mask is a function of a seed, drawn from torch's default generator,
            and of the element's index: the same for every device, thread count and recomputation.
        rank: the leading directions that take part, 0 to capacity (the default). The others get
            zero gradients.

    All tensors have one dtype (float64, float32, bfloat16 or float16), or the factors are float32
    over a 16-bit base. Returns ``[..., out]`` in the input's dtype.

    Raises:
        RuntimeError: naming the argument, what was wanted and what came.
    """
    if _is_jagged("lora_linear", "input", input):
        options = dict(scaling=scaling, dropout_p=dropout_p, rank=rank)
        return _over_values(
            lambda x: lora_linear(x, weight, bias, lora_A, lora_B, lora_E, **options), input
        )
    return _ops.lora_linear(
        input, weight, bias, lora_A, lora_B, lora_E, scaling=scaling, dropout_p=dropout_p, rank=rank
    )


def lora_linear_group(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    lora_E: Sequence[Tensor | None],
    *,
    scaling: Sequence[float],
    dropout_p: float = 0.0,
    ranks: Sequence[int] | None = None,
) -> list[Tensor]:
    """lora_linear of several layers that share their input, as one op with one gradient of x.

    The lists have an element for each layer, at least one; None for a bias or E that is not there.
    Sizes, dtypes and numbers as lora_linear's; in sizes, devices and dtypes are one for all. With
    dropout one mask of x serves all layers. Returns their outputs.

    Raises:
        RuntimeError: naming layer and argument, what was wanted and what came.
    """
    options = dict(scaling=scaling, dropout_p=dropout_p, ranks=ranks)
    return _ops.lora_linear_group(input, weights, biases, lora_A, lora_B, lora_E, **options)


def lora_update(
    base_output: Tensor,
    input: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    lora_E: Tensor | None = None,
    *,
    scaling: float,
    dropout_p: float = 0.0,
    rank: int | None = None,
) -> Tensor:
    """A low-rank update alone: ``base_output + scaling * ((drop(x) A^T) * E^T) B^T``, as one op.

    For a base that computes itself: quantised, hooked, offloaded. The base's product keeps its own
    code and gets the adapter's.

    Args:
        base_output: ``[..., out]``; its gradient is the result's.
        input: x ``[..., in]``, with base_output's leading dimensions, dtype and device.
        lora_A: ``[capacity, in]``.
        lora_B: ``[out, capacity]``.
        lora_E: ``[capacity, 1]`` or None for ones.
        scaling, dropout_p, rank: as lora_linear.

    All tensors have one dtype (float64, float32, bfloat16 or float16), or the factors are float32
    over 16-bit ones. Returns ``[..., out]`` in base_output's dtype, rounded once.

    Raises:
        RuntimeError: naming the argument, what was wanted and what came.
    """
    return _ops.lora_update(
        base_output,
        input,
        lora_A,
        lora_B,
        lora_E,
        scaling=scaling,
        dropout_p=dropout_p,
        rank=rank,
    )


def lora_embedding(
    indices: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    lora_E: Tensor | None = None,
    *,
    scaling: float,
    padding_idx: int | None = None,
    rank: int | None = None,
) -> Tensor:
    """An embedding with a low-rank update: ``y[i] = W0[i] + scaling * (A^T[i] * E^T) B^T``.

    Args:
        indices: any shape, int64 or int32; or a nested tensor of such.
        weight: W0 ``[num, dim]``.
        lora_A: ``[capacity, num]``.
        lora_B: ``[dim, capacity]``.
        lora_E: ``[capacity, 1]`` or None for ones.
        scaling: factor of the update, finite.
        padding_idx: the row of the table and of A^T that gets no gradient, or None; a negative one
            counts from the end, as in F.embedding.
        rank: the leading directions that take part; default all.

    Returns ``[*indices.shape, dim]`` in W0's dtype, whatever autocast is set to. An index outside
    of the table raises an IndexError; on CUDA it is a failed assertion of the device.
    """
    if _is_jagged("lora_embedding", "indices", indices):
        options = dict(scaling=scaling, padding_idx=padding_idx, rank=rank)
        return _over_values(
            lambda i: lora_embedding(i, weight, lora_A, lora_B, lora_E, **options), indices
        )
    rows = weight.shape[0]
    if padding_idx is not None and not -rows <= padding_idx < rows:
        raise ValueError(
            f"lora_embedding: padding_idx must be in [{-rows}, {rows}), got {padding_idx}"
        )
    return _ops.lora_embedding(
        indices,
        weight,
        lora_A,
        lora_B,
        lora_E,
        scaling=scaling,
        padding_idx=-1 if padding_idx is None else padding_idx % rows,
        rank=rank,
    )


def merged_weight(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    lora_E: Tensor | None = None,
    *,
    scaling: float,
    rank: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``round(W0 + scaling * B diag(E) A)``: summed in float64 and rounded once to W0's dtype.

    Returns:
        The merged weight ``[out, in]`` with W0's strides; the largest ``|rounded - exact|``
        (float64, 0-d; not finite if the sum is not); the number of elements that differ from W0
        (int64, 0-d).
    """
    return _ops.merged_weight(weight, lora_A, lora_B, lora_E, scaling=scaling, rank=rank)


def orthogonality_penalty(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    *,
    squared: bool = True,
    ranks: Sequence[int] | None = None,
) -> Tensor:
    """How far factors are from orthonormal directions, as one differentiable scalar.

    With ``D = A A^T - I`` and ``B^T B - I``: the sum over all factors of ``||D||_F^2`` (AdaLoRA,
    arXiv 2303.10512, equation 4), or with ``squared=False`` the mean of ``||D||_F`` (the paper's
    code and PEFT).

    Args:
        lora_A: ``[capacity, in]`` each.
        lora_B: ``[out, capacity]`` each.
        ranks: of each pair, the leading directions that count; default all.

    Returns a 0-d tensor, float64 for float64 factors and float32 for all others.
    """
    if ranks is None:
        ranks = [A.shape[0] for A in lora_A]
    return _ops.orthogonality_penalty(lora_A, lora_B, ranks, squared)


def dropout_mask(
    seed: Tensor, rows: int, cols: int, dropout_p: float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The mask of lora_linear's dropout, ``[rows, cols]`` of 0 and 1.

    Element (i, j) depends on ``seed`` (int64 ``[1]``) and ``i * cols + j`` alone (Philox4x32-7,
    Salmon et al., SC 2011): a 16-bit number below ``round(65536 p)`` drops it.
    """
    return _ops._dropout_mask(seed, rows, cols, dropout_p, dtype=dtype)


def path(tensor: Tensor, layer: Sequence[int] = ()) -> str:
    """What serves tensors of this type and device: "cpu (micro-kernel)", "cuda (composite)", ...

    With a ``layer``'s (tokens, n_in, n_out, rank), all of one dtype and well aligned, also which
    product a GPU takes for its forward: "cuda (sm_90a)" has the LoRA term in the product's sums,
    "cuda (cuBLASLt)" beside them.
    """
    like = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return _ops._lora_linear_path(like, layer)


_CPU_PATHS = {str(path): path for path in _library.CpuPath.__members__.values()}


def set_cpu_path(name: str) -> None:
    """Which products compute lora_linear on CPUs, from now on and in all threads.

    Both paths are exact to rounding, and each gives the same bits in every run and for every number
    of threads; their last bits differ.

    Args:
        name: "micro-kernel" (the default: oneDNN's, where it serves the types), "ATen" (PyTorch's
            own products), or "measured": the faster of both, timed at the first call of each kind
            (forward or backward, dtypes, tokens up to a power of two, widths, rank, dropout or
            not), which takes as long as nine. Which bits come out then depends on the timing;
            under torch.use_deterministic_algorithms(True) "measured" is "micro-kernel".

    Raises:
        ValueError: for another name.
    """
    if name not in _CPU_PATHS:
        raise ValueError(f"set_cpu_path: name must be one of {', '.join(_CPU_PATHS)}, got {name!r}")
    _library.set_cpu_path(_CPU_PATHS[name])


def measured_paths() -> list:
    """What the path "measured" timed in this process, an entry for each kind of calls.

    Entries have ``call`` ("forward" or "backward"), ``dtype``, ``tokens`` (the most of the kind),
    ``n_in``, ``n_out``, ``rank``, ``dropout``, ``micro_kernel_ms`` and ``aten_ms`` (the least of
    three times each), and ``chosen``.
    """
    return _library.measured_paths()
