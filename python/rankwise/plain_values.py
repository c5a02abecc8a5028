"""States of plain values and tensors, nested as they like, as JSON beside named tensors."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Mapping

from torch import Tensor

_MAPPINGS = {kind.__name__: kind for kind in (dict, Counter, OrderedDict)}
_KEYS = (bool, int, float, str, type(None))


def to_json(value, name: str, tensors: dict[str, Tensor]):
    """A value as JSON has it, from which from_json() makes an equal one of the same types.

    JSON's own values stand for themselves; of the others each is an object whose only key is what
    it is: ``{"tuple": [...]}``, ``{"dict": [[key, value], ...]}``, ``{"float": "nan"}``,
    ``{"tensor": name}``.

    Args:
        name: of the value, in messages and in the tensors' names.
        tensors: gets the tensors that are in the value.

    Raises:
        TypeError: naming what is no plain value.
    """
    if isinstance(value, Tensor):
        while name in tensors:  # "a.b" in one mapping and "b" of "a" in another
            name += "'"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    kind = type(value)
    if kind in (bool, int, str, type(None)):
        return value
    if kind in (list, tuple):
        items = [to_json(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
        return items if kind is list else {"tuple": items}
    if kind in _MAPPINGS.values():
        return {kind.__name__: [_entry(k, v, name, tensors) for k, v in value.items()]}
    raise TypeError(
        f"{name} must be a tensor, a number, a string, None, or a list, tuple or dict of such, "
        f"got {kind.__module__}.{kind.__qualname__}"
    )


def _entry(key, value, name: str, tensors: dict[str, Tensor]) -> list:
    if not isinstance(key, _KEYS):
        raise TypeError(f"{name} must have numbers or strings as keys, got {key!r}")
    inside = f"{name}.{key}" if name else str(key)
    return [to_json(key, name, tensors), to_json(value, inside, tensors)]


def from_json(json, tensors: Mapping[str, Tensor]):
    """The value that to_json() made JSON of.

    Raises:
        ValueError: it did not.
        KeyError: a tensor is missing.
    """
    if isinstance(json, list):
        return [from_json(item, tensors) for item in json]
    if not isinstance(json, dict):
        return json
    if len(json) != 1:
        raise ValueError(f"an object must have one key, got {sorted(json)}")
    ((kind, content),) = json.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "float":
        return float(content)
    if kind == "tuple":
        return tuple(from_json(content, tensors))
    if kind in _MAPPINGS:
        return _MAPPINGS[kind](dict(from_json(content, tensors)))
    raise ValueError(f"an object must be one of tensor, float, tuple, dict, got {kind!r}")


def copied(value):
    """The same in memory of its own."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (list, tuple):
        return type(value)(copied(item) for item in value)
    if type(value) in _MAPPINGS.values():
        return type(value)({key: copied(item) for key, item in value.items()})
    return value
