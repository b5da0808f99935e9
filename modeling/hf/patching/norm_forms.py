"""Which norm a module computes, read off its expression.

    RMSNorm    x * R * (offset + w)          R = 1 / sqrt(mean(x^2) + eps)
    LayerNorm  (x - mean(x)) * R * w + b     R = 1 / sqrt(mean((x - mean(x))^2) + eps)

in the variants that transformers has: where it rounds, in which dtype it multiplies by the weight,
and what of weight, offset and bias there is. Anything else, however little it differs (eps outside
the root, a clamp, a bias), is no form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from swathe.kernels.norm.api import Casting
from swathe.modeling.hf.patching.canonical import (
    Expression,
    cast,
    dtype_of,
    factors_of,
    mean,
    power,
    product,
    terms_of,
    total,
)

_X: Expression = ("input", 0)
_WIDE = cast(torch.float32, _X)
_OWN = dtype_of(_X)


@dataclass(frozen=True)
class RMSForm:
    """Arguments of rms_norm for one module; `weight` names its parameter, None if it has none.

    `alike`: holds only where x and weight have one dtype. `torchs`: it calls torch's own rms_norm.
    `in_autocast`: holds under autocast too, which sees torch's own norms, but not their parts.
    """

    weight: str | None
    eps: float
    offset: float = 0.0
    casting: Casting = "fp32"
    alike: bool = False
    in_autocast: bool = True
    torchs: bool = False


@dataclass(frozen=True)
class LayerForm:
    """Arguments of layer_norm for one module; the names of its parameters, None for none."""

    weight: str | None
    bias: str | None
    eps: float
    alike: bool = False
    in_autocast: bool = True
    torchs: bool = False


def looks_like_a_norm(e: Any) -> bool:
    """Whether anywhere in an expression something is divided by a root, or a norm is called."""
    if not isinstance(e, tuple):
        return False
    rooted = e[:1] == ("pow",) and e[2] == -0.5
    return rooted or e[:1] in (("layer_norm",), ("rms_norm",)) or any(map(looks_like_a_norm, e))


def rms_form(e: Expression) -> RMSForm | None:
    """The RMSNorm that an expression is."""
    if e[0] == "rms_norm":
        _, x, shape, weight, eps = e
        known = x == _X and len(shape) == 1 and isinstance(eps, float)
        found = RMSForm(_name(weight), eps, alike=True, in_autocast=False, torchs=True)
        return found if known and (weight is None or found.weight) else None
    rounded, inner = _unrounded(e)
    factors = list(factors_of(inner))
    if not all(isinstance(factor, tuple) for factor in factors):
        return None  # a number among them
    for i, factor in enumerate(factors):
        rest = [*factors[:i], *factors[i + 1 :]]
        if factor[0] == "to":
            found = _rounded_before_weight(factor, rest, rounded)
        else:
            found = _rounded_after_weight(factor, rest, rounded)
        if found is not None:
            return found
    return None


def _rounded_before_weight(factor: Expression, rest: list[Any], rounded: bool) -> RMSForm | None:
    """to(x * R) * w, and the rarer x * to(R)."""
    _, dtype, core = factor
    eps = _root(core)
    if eps is not None and dtype == _OWN:
        return RMSForm(None, eps) if rest == [_X] and not rounded else None
    eps = _normalised(core)
    scale = _scale(rest, rounded)
    if eps is None or scale is None:
        return None
    # a fixed dtype is T5's, which rounds to that of the weight
    alike = rounded or dtype != _OWN
    return RMSForm(scale[0], eps, scale[1], "llama", alike)


def _rounded_after_weight(root: Expression, rest: list[Any], rounded: bool) -> RMSForm | None:
    """to(x * R * w), or the same without a cast where all have one dtype."""
    eps = _root(root)
    x = next((x for x in (_X, _WIDE) if x in rest), None)
    if eps is None or x is None:
        return None
    rest.remove(x)
    if not rest:
        own = x == _X and root == _root_of(_X, eps)
        return RMSForm(None, eps) if rounded or own else None
    scale = _scale(rest, rounded)
    if scale is None or (not rounded and x == _WIDE):
        return None
    return RMSForm(scale[0], eps, scale[1], "fp32" if rounded else "llama", alike=not rounded)


def layer_form(e: Expression) -> LayerForm | None:
    """The LayerNorm that an expression is."""
    rounded, inner = _unrounded(e)
    if inner[0] == "layer_norm":
        _, x, shape, weight, bias, eps = inner
        known = x in ((_X, _WIDE) if rounded else (_X,)) and len(shape) == 1
        if not known or not all(p is None or _name(p) for p in (weight, bias)):
            return None
        names = _name(weight), _name(bias)
        return LayerForm(*names, eps, alike=True, in_autocast=x == _WIDE, torchs=True)
    terms = list(terms_of(inner))
    biases = [t for t in terms if _scale([t], rounded) is not None]
    for x in (_X, _WIDE):
        centred = total(x, product(-1.0, mean(x)))
        if not biases:
            found = _scaled(inner, x, centred, rounded)
        elif len(biases) == 1 and len(terms) == 2:
            (scaled,) = (t for t in terms if t != biases[0])
            found = _scaled(scaled, x, centred, rounded, _scale(biases, rounded))
        else:
            found = None
        if found is not None:
            return found
    return None


def _scaled(
    e: Expression,
    x: Expression,
    centred: Expression,
    rounded: bool,
    bias: tuple[str | None, float] | None = (None, 0.0),
) -> LayerForm | None:
    """(x - mean) * R * w, the first two of which may be rounded before the weight."""
    for factor in factors_of(e):
        if not isinstance(factor, tuple):
            return None
        core = factor[2] if factor[:2] == ("to", _OWN) else None
        eps = _root_over(factor if core is None else _other(core, centred), centred)
        if eps is None:
            continue
        rest = [f for f in factors_of(e) if f != factor]
        if core is None:
            if centred not in rest:
                continue
            rest.remove(centred)
        scale = _scale(rest, rounded) if rest else (None, 0.0)
        if scale is None or bias is None or scale[1] != 0 or bias[1] != 0:
            continue
        if rounded or x == _X or core is not None:
            return LayerForm(scale[0], bias[0], eps, alike=not rounded)
    return None


def _other(core: Expression, factor: Expression) -> Any:
    """What is left of a product of two without one of them."""
    rest = [f for f in factors_of(core) if f != factor]
    return rest[0] if len(rest) == 1 and len(factors_of(core)) == 2 else None


def _unrounded(e: Expression) -> tuple[bool, Expression]:
    return (True, e[2]) if e[:2] == ("to", _OWN) else (False, e)


def _root_of(x: Expression, eps: float) -> Expression:
    return power(total(eps, mean(power(x, 2))), -0.5)


def _root_over(e: Any, x: Expression) -> float | None:
    """eps, if `e` is 1 / sqrt(mean(x^2) + eps)."""
    if not isinstance(e, tuple) or e[0] != "pow" or e[1][0] != "add":
        return None
    eps = e[1][1]
    return eps if isinstance(eps, float) and e == _root_of(x, eps) else None


def _root(e: Any) -> float | None:
    found = _root_over(e, _WIDE)
    return found if found is not None else _root_over(e, _X)


def _normalised(e: Expression) -> float | None:
    """eps, if `e` is x / sqrt(mean(x^2) + eps)."""
    for x in (_X, _WIDE):
        eps = _root(_other(e, x))
        if eps is not None:
            return eps
    return None


def _scale(rest: list[Any], rounded: bool) -> tuple[str, float] | None:
    """(parameter, offset), if `rest` is one factor that is a parameter plus a number.

    A parameter in fp32 gives a result in fp32, which no form does unless it is `rounded` after.
    """
    if len(rest) != 1 or not isinstance(rest[0], tuple):
        return None
    e = bare = _narrow(rest[0])
    offset = 0.0
    if e[0] == "add" and len(e) == 3 and isinstance(e[1], float):
        offset, bare = e[1], _narrow(e[2])
    name = _name(bare)
    widened = e != rest[0] or (offset != 0 and bare != e[2])
    return None if name is None or (widened and not rounded) else (name, offset)


def _narrow(e: Expression) -> Expression:
    """Without a cast to fp32."""
    return e[2] if e[:2] == ("to", torch.float32) else e


def _name(e: Any) -> str | None:
    """The name of a parameter of the module's own."""
    if not isinstance(e, tuple) or e[0] != "parameter" or "." in e[1]:
        return None
    name: str = e[1]
    return name
