"""Whether a configuration value fits its field: types from annotations, ranges from a table."""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

import torch

from swathe.modeling.errors import ConfigError

DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
}
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2", "silu", "swish")

Range = tuple[float, float]


def fits(value: object, hint: Any) -> bool:
    """Whether `value` is of the annotated type; an int serves as a float, a bool not as an int."""
    if hint is Any:
        return True
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, a) for a in args)
    if origin is typing.Literal:
        return value in args
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(fits(v, args[0]) for v in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(
            fits(k, args[0]) and fits(v, args[1]) for k, v in value.items()
        )
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return value is None if hint is type(None) else isinstance(value, hint)


def check_type(owner: str, name: str, value: object, hint: Any) -> None:
    """Raise ConfigError naming field, type and value unless `value` fits the annotation."""
    if not fits(value, hint):
        allowed = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
        raise ConfigError(
            f"{owner}.{name}={value!r} is a {type(value).__name__}; it must be {allowed}"
        )


def check_range(owner: str, name: str, value: object, bounds: Range) -> None:
    """Raise ConfigError unless every number in `value` lies within the closed interval."""
    low, high = bounds
    for number in value if isinstance(value, list | tuple) else (value,):
        if isinstance(number, int | float) and not low <= number <= high:
            raise ConfigError(
                f"{owner}.{name}={value!r} is out of range; allowed: {low:g} to {high:g}"
            )


def positive(limit: float = math.inf) -> Range:
    """The smallest number above 0 to `limit`; infinity itself is not included."""
    return 5e-324, min(limit, 1.7976931348623157e308)


def dtype_named(value: object, owner: str) -> torch.dtype | None:
    """One of DTYPES from itself or its name, with or without `torch.`; or None."""
    if value is None or value in DTYPES.values():
        return value  # type: ignore[return-value]
    found = DTYPES.get(value.removeprefix("torch.")) if isinstance(value, str) else None
    if found is None:
        close = difflib.get_close_matches(str(value), DTYPES, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close and isinstance(value, str) else ""
        why = "; weights load as floating point" if isinstance(value, torch.dtype) else ""
        raise ConfigError(f"{owner}.dtype={value!r}{hint}; allowed: {sorted(DTYPES)} or None{why}")
    return found


def named_labels(count: object) -> dict[str, Any]:
    """id2label and label2id of so many labels without names, as HF calls them."""
    if not isinstance(count, int) or isinstance(count, bool) or not 0 < count <= 2**20:
        raise ConfigError(f"num_labels={count!r} must be a whole number from 1 to {2**20}")
    names = {i: f"LABEL_{i}" for i in range(count)}
    return {"id2label": names, "label2id": {name: i for i, name in names.items()}}


def labels_by_number(owner: str, labels: object) -> dict[int, Any]:
    """An id2label with whole numbers as keys, which JSON has as text; ConfigError for others."""
    if not isinstance(labels, Mapping):
        raise ConfigError(
            f"{owner}.id2label={labels!r}: expected a dict from number to name, such as {{0: 'no'}}"
        )
    for key in labels:
        number = type(key) is int and key >= 0
        if not number and not (isinstance(key, str) and key.isdecimal()):
            raise ConfigError(
                f"{owner}.id2label has the key {key!r}; keys must be whole numbers from 0"
            )
    return {int(key): name for key, name in labels.items()}
