"""Functions of torch on expressions: one spelling for what is computed alike.

What an expression may look like is said in symbolic.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

Expression = tuple[Any, ...]
Arguments = tuple[Any, ...]
Named = Mapping[str, Any]

_CASTS = {
    "float": torch.float32,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "double": torch.float64,
}
_POWERS = {"square": 2.0, "sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0}
_UNCHANGED = frozenset(("contiguous",))
_PLAIN = frozenset(("silu", "relu", "sigmoid", "tanh"))
_NORMS = {
    "layer_norm": ("normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("normalized_shape", "weight", "eps"),
}
_LAST = (-1, (-1,))


def canonical(name: str, args: Arguments, kwargs: Named) -> Expression:
    """The expression of a call of torch's function or tensor method `name`."""
    name = name.strip("_")
    rule = _RULES.get(name)
    found = rule(args, kwargs) if rule is not None else None
    if found is not None:
        return found
    if name in _CASTS and len(args) == 1:
        return cast(_CASTS[name], args[0])
    if name in _POWERS and len(args) == 1:
        return power(args[0], _POWERS[name])
    if name in _UNCHANGED:
        e: Expression = args[0]
        return e
    if name in _PLAIN:
        return (name, args[0])
    if name in _NORMS:
        given = dict(zip(_NORMS[name], args[1:], strict=False)) | dict(kwargs)
        return (name, args[0], *(given.get(key) for key in _NORMS[name]))
    return (name, *args, *sorted(kwargs.items(), key=repr))


def dtype_of(e: Expression) -> Any:
    """The dtype of what a cast gives, a torch.dtype where it is fixed; else ("dtype", e)."""
    return e[1] if e[0] == "to" else ("dtype", e)


def cast(dtype: Any, e: Expression) -> Expression:
    """`e` rounded to a dtype; casts that change nothing are left out."""
    if dtype_of(e) == dtype:
        return e
    return ("to", dtype, e)


def power(e: Any, n: float) -> Expression:
    """e ** n; of powers of powers only 1 / sqrt is joined, since sqrt(e ** 2) is not e."""
    if n == 1:
        same: Expression = e
        return same
    if e[0] == "pow" and e[2] == 0.5 and n == -1:
        return ("pow", e[1], -0.5)
    return ("pow", e, float(n))


def product(*factors: Any) -> Expression:
    """A flat, sorted product; numbers are multiplied out and equal factors are powers."""
    number, counted = 1.0, Counter[Any]()
    for factor in _flat("mul", factors):
        if _is_number(factor):
            number *= factor
        elif factor[0] == "pow" and factor[2] == int(factor[2]) > 0:
            counted[factor[1]] += int(factor[2])
        else:
            counted[factor] += 1
    powers = [power(e, n) for e, n in counted.items()]
    return _joined("mul", powers, number, neutral=1.0)


def total(*terms: Any) -> Expression:
    """A flat, sorted sum; numbers are added up."""
    number, kept = 0.0, []
    for term in _flat("add", terms):
        if _is_number(term):
            number += term
        else:
            kept.append(term)
    return _joined("add", kept, number, neutral=0.0)


def mean(e: Expression) -> Expression:
    """The mean over the last dimension, which is kept."""
    return ("mean", e)


def variance(e: Expression) -> Expression:
    """The mean square of what `mean` leaves."""
    return mean(power(total(e, product(-1.0, mean(e))), 2))


def factors_of(e: Expression) -> tuple[Any, ...]:
    """The factors of a product; any other expression is its own."""
    return e[1:] if e[0] == "mul" else (e,)


def terms_of(e: Expression) -> tuple[Any, ...]:
    """The terms of a sum; any other expression is its own."""
    return e[1:] if e[0] == "add" else (e,)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _flat(kind: str, parts: Any) -> list[Any]:
    found: list[Any] = []
    for part in parts:
        nested = isinstance(part, tuple) and part[0] == kind
        found += _flat(kind, part[1:]) if nested else [part]
    return found


def _joined(kind: str, parts: list[Any], number: float, neutral: float) -> Expression:
    # order must not depend on which operand was written first
    parts = sorted(parts, key=repr)
    if number != neutral or not parts:
        parts = [number, *parts]
    return parts[0] if len(parts) == 1 and isinstance(parts[0], tuple) else (kind, *parts)


def _add(args: Arguments, kwargs: Named) -> Expression | None:
    return total(*args) if len(args) == 2 and not kwargs else None


def _sub(args: Arguments, kwargs: Named) -> Expression | None:
    return total(args[0], product(-1.0, args[1])) if len(args) == 2 and not kwargs else None


def _mul(args: Arguments, kwargs: Named) -> Expression | None:
    return product(*args) if len(args) == 2 and not kwargs else None


def _div(args: Arguments, kwargs: Named) -> Expression | None:
    if len(args) != 2 or kwargs:
        return None
    over = args[1]
    return product(args[0], 1.0 / over if _is_number(over) else power(over, -1.0))


def _pow(args: Arguments, kwargs: Named) -> Expression | None:
    base: Any = args[0]
    n: Any = args[1] if len(args) > 1 else kwargs.get("exponent")
    return power(base, n) if _is_number(n) and isinstance(base, tuple) else None


def _neg(args: Arguments, kwargs: Named) -> Expression:
    return product(-1.0, args[0])


def _mean(args: Arguments, kwargs: Named) -> Expression | None:
    given = dict(zip(("input", "dim", "keepdim"), args, strict=False)) | dict(kwargs)
    if "axis" in given:
        given["dim"] = given.pop("axis")
    known = set(given) == {"input", "dim", "keepdim"} and given["keepdim"] is True
    return mean(given["input"]) if known and given["dim"] in _LAST else None


def _var(args: Arguments, kwargs: Named) -> Expression | None:
    given = dict(zip(("input", "dim"), args, strict=False)) | dict(kwargs)
    biased = given.pop("unbiased", None) is False or given.pop("correction", None) == 0
    known = biased and len(args) <= 2 and set(given) == {"input", "dim", "keepdim"}
    return variance(given["input"]) if known and given["dim"] in _LAST else None


def _to(args: Arguments, kwargs: Named) -> Expression | None:
    e, *rest = args
    wanted = [v for v in (*rest, *(kwargs.values())) if not _is_device(v)]
    extra = set(kwargs) - {"dtype", "device"}
    if extra or len(wanted) > 1:
        return None
    if not wanted:
        return e  # type: ignore[no-any-return]
    target = wanted[0]
    if isinstance(target, torch.dtype):
        return cast(target, e)
    if not isinstance(target, tuple):
        return None
    return cast(target if target[0] == "dtype" else dtype_of(target), e)


def _is_device(value: Any) -> bool:
    symbolic = isinstance(value, tuple) and value[:1] == ("device",)
    return symbolic or isinstance(value, torch.device | str)


def _dropout(args: Arguments, kwargs: Named) -> Expression | None:
    given = dict(zip(("input", "p", "training"), args, strict=False)) | dict(kwargs)
    off = given.get("training", True) is False or given.get("p", 0.5) == 0
    return given["input"] if off else None


def _gelu(args: Arguments, kwargs: Named) -> Expression:
    approximate: Any = kwargs.get("approximate", (*args, "none")[1])
    (e, *_) = args
    return ("gelu" if approximate == "none" else f"gelu_{approximate}", e)


_RULES: dict[str, Any] = {
    **dict.fromkeys(("add", "radd"), _add),
    **dict.fromkeys(("sub", "subtract"), _sub),
    **dict.fromkeys(("mul", "multiply", "rmul"), _mul),
    **dict.fromkeys(("div", "divide", "truediv", "true_divide"), _div),
    "pow": _pow,
    **dict.fromkeys(("neg", "negative"), _neg),
    "mean": _mean,
    "var": _var,
    **dict.fromkeys(("to", "type_as"), _to),
    "dropout": _dropout,
    "gelu": _gelu,
}
