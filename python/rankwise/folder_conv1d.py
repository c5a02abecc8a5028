"""Which weights of a model's folder are GPT-2's Conv1D, stored as [in, out]."""

from __future__ import annotations

from .model_folder import ModelFolder


def square_are_conv1d(folder: ModelFolder, fan_in_fan_out: bool) -> bool:
    """Whether square weights with a bias are GPT-2's Conv1D, [in, out]: as the others are.

    The adapter's configuration tells where those are of both kinds, or none; PEFT's is that of the
    last module alone.
    """
    kinds = {kind for name in folder.tensors if (kind := _shown_by_bias(name, folder)) is not None}
    return kinds.pop() if len(kinds) == 1 else fan_in_fan_out


def is_conv1d(name: str, folder: ModelFolder, square: bool) -> bool:
    """A Conv1D always has a bias."""
    shown = _shown_by_bias(name, folder)
    return square and _bias_name(name) in folder.tensors if shown is None else shown


def _shown_by_bias(name: str, folder: ModelFolder) -> bool | None:
    """Whether a weight's columns, not its rows, are as many as its bias; None where both are."""
    stored, bias = folder.tensors.get(name), folder.tensors.get(_bias_name(name))
    if stored is None or bias is None or not name.endswith(".weight") or len(stored.shape) != 2:
        return None
    rows, columns = stored.shape
    return None if rows == columns else {(rows,): False, (columns,): True}.get(bias.shape)


def _bias_name(name: str) -> str:
    return name.removesuffix("weight") + "bias"
