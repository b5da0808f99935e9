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
    """A torch dtype from itself, its name with or without `torch.`, or None."""
    if value is None or isinstance(value, torch.dtype):
        return value
    found = DTYPES.get(value.removeprefix("torch.")) if isinstance(value, str) else None
    if found is None:
        close = difflib.get_close_matches(str(value), DTYPES, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ConfigError(f"{owner}.dtype={value!r}{hint}; allowed: {sorted(DTYPES)} or None")
    return found
