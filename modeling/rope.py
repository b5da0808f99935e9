"""Rotary position embedding: the parameters of each type, their spellings and their limits.

Configurations hold what `normalised` makes of any spelling, HF's v5 one: `rope_parameters` with
rope_type and rope_theta inside. The formulas are in modeling/rope_frequencies.py.

Source   Su et al. 2021, arXiv:2104.09864; names and defaults of keys are HF's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swathe.kernels.core.errors import did_you_mean
from swathe.modeling.errors import ConfigError
from swathe.modeling.rope_frequencies import (
    Frequencies,
    default_frequencies,
    dynamic_at_length,
    linear_frequencies,
    llama3_frequencies,
    longrope_at_length,
    longrope_frequencies,
    proportional_frequencies,
    rotated_features,
    yarn_frequencies,
)

DEFAULT_THETA = 10000.0
ALIASES = {"su": "longrope"}  # as Phi-3's first files have it
LONGEST = 2**30
PARTIAL, ORIGINAL = "partial_rotary_factor", "original_max_position_embeddings"


@dataclass(frozen=True)
class RopeType:
    """One rope type; `frequencies(parameters, head_dim, device)` is (inv_freq, cos/sin factor).

    `required` and `optional` are its parameters beside rope_type and rope_theta: numbers above 0
    where LIMITS does not say otherwise. `check(parameters)` and `fits(parameters, R)` say what else
    is wrong with them, by themselves and for R rotated features, or None.
    Where frequencies depend on a length, `at_length(inv_freq, parameters, length)` makes them from
    what `frequencies` gave; parameters then hold max_position_embeddings, and `length` is a tensor
    of no dimensions. `keeps_longest`: HF goes by the longest forward so far, see RotaryEmbedding.
    `whole_head`: cos and sin are as wide as a head whatever partial_rotary_factor says.
    """

    frequencies: Callable[[Mapping[str, Any], int, torch.device | None], Frequencies]
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    check: Callable[[Mapping[str, Any]], str | None] = lambda parameters: None
    fits: Callable[[Mapping[str, Any], int], str | None] = lambda parameters, R: None
    at_length: Callable[[Tensor, Mapping[str, Any], Tensor], Tensor] | None = None
    keeps_longest: bool = False
    whole_head: bool = False


Limit = tuple[Callable[[Any], bool], str]


def _number(value: object, low: float = 0.0) -> bool:
    """Whether it is a number, not a bool, from `low` to the largest that fp32 has."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return low <= value <= torch.finfo(torch.float32).max


def _positive(value: object) -> bool:
    return _number(value, torch.finfo(torch.float32).tiny)


def _count(value: Any) -> bool:
    return _number(value, 1) and value <= LONGEST and value == int(value)


def _factors(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(map(_positive, value))


POSITIVE: Limit = (_positive, "a finite number above 0 (in float32)")
COUNT: Limit = (_count, f"a whole number from 1 to {LONGEST}")
FACTORS: Limit = (_factors, "a list of finite numbers above 0 (in float32)")
SCALE: Limit = (_number, "a finite number of at least 0")

LIMITS: dict[str, Limit] = {
    "factor": (lambda v: _number(v, 1), "at least 1, a finite number"),
    ORIGINAL: COUNT,
    "short_factor": FACTORS,
    "long_factor": FACTORS,
    "mscale": SCALE,
    "mscale_all_dim": SCALE,
    "truncate": (lambda v: isinstance(v, bool), "True or False"),
    PARTIAL: (lambda v: _number(v) and v <= 1, "a number from 0 to 1"),
}


def _check_llama3(p: Mapping[str, Any]) -> str | None:
    if p["low_freq_factor"] < p["high_freq_factor"]:
        return None
    return (
        f"low_freq_factor={p['low_freq_factor']} and high_freq_factor={p['high_freq_factor']} "
        "must satisfy 0 < low < high"
    )


def _check_yarn(p: Mapping[str, Any]) -> str | None:
    fast, slow = p.get("beta_fast", 32), p.get("beta_slow", 1)
    if fast < slow:
        return f"beta_fast={fast} must be at least beta_slow={slow}; left out, they are 32 and 1"
    if p["rope_theta"] <= 1:
        return f"rope_theta={p['rope_theta']} must be above 1, so that waves differ in length"
    return None


def _check_longrope(p: Mapping[str, Any]) -> str | None:
    if p[ORIGINAL] == 1 and "attention_factor" not in p:
        return f"{ORIGINAL}=1 must be at least 2 where attention_factor is not given"
    return None


def _longrope_fits(p: Mapping[str, Any], R: int) -> str | None:
    for key in ("short_factor", "long_factor"):
        if len(p[key]) != R // 2:
            return f"{key} has {len(p[key])} numbers; {R} rotated features need {R // 2}"
    return None


def _dynamic_fits(p: Mapping[str, Any], R: int) -> str | None:
    return None if R >= 4 else f"{R} rotated features are too few; it needs an even number from 4"


ROPE_TYPES: dict[str, RopeType] = {
    "default": RopeType(default_frequencies, optional=(PARTIAL,)),
    "linear": RopeType(linear_frequencies, required=("factor",), optional=(PARTIAL,)),
    "dynamic": RopeType(
        default_frequencies,
        required=("factor",),
        optional=(PARTIAL,),
        fits=_dynamic_fits,
        at_length=dynamic_at_length,
        keeps_longest=True,
    ),
    "yarn": RopeType(
        yarn_frequencies,
        required=("factor", ORIGINAL),
        optional=(
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
            PARTIAL,
        ),
        check=_check_yarn,
    ),
    "longrope": RopeType(
        longrope_frequencies,
        required=("short_factor", "long_factor", ORIGINAL),
        optional=("factor", "attention_factor", PARTIAL),
        check=_check_longrope,
        fits=_longrope_fits,
        at_length=longrope_at_length,
    ),
    "llama3": RopeType(
        llama3_frequencies,
        required=("factor", "low_freq_factor", "high_freq_factor", ORIGINAL),
        optional=(PARTIAL,),
        check=_check_llama3,
    ),
    "proportional": RopeType(
        proportional_frequencies, optional=("factor", PARTIAL), whole_head=True
    ),
}


def register_rope(name: str, rope_type: RopeType) -> None:
    """Make a rope type usable from config.json; its parameters are validated like ours."""
    if name in ROPE_TYPES:
        raise ValueError(f"rope_type {name!r} exists already; choose another name")
    ROPE_TYPES[name] = rope_type


def normalised(
    parameters: object, file_keys: Mapping[str, Any], *, aliases: Mapping[str, str] = ALIASES
) -> dict[str, Any]:
    """HF's v5 spelling of any rope spelling, validated; the caller's dict is never changed.

    `file_keys` are keys beside it in older files: rope_theta, partial_rotary_factor,
    original_max_position_embeddings. A value inside the dict wins over them; two original lengths
    that differ are refused, as HF would take the outer one. `aliases` are other names of types.
    Raises ConfigError naming the key, its value and what is allowed.
    """
    if parameters is not None and not isinstance(parameters, Mapping):
        raise ConfigError(
            f"rope_parameters={parameters!r}: expected a dict such as {{'rope_type': 'default', "
            "'rope_theta': 10000.0} or None"
        )
    spelled = dict(parameters or {})
    nested = [k for k, v in spelled.items() if isinstance(v, Mapping)]
    if nested:
        raise ConfigError(
            f"rope_parameters has a dict for each of {nested}; this model family takes one for all "
            "its layers, such as {'rope_type': 'default', 'rope_theta': 10000.0}"
        )
    old = spelled.pop("type", None)
    name = next((n for n in (spelled.get("rope_type"), old) if n is not None), "default")
    name = aliases.get(name, name) if isinstance(name, str) else name
    if not isinstance(name, str) or name not in ROPE_TYPES:
        raise ConfigError(
            f"unknown rope_type {name!r}{did_you_mean(str(name), ROPE_TYPES)}; "
            f"known: {sorted(ROPE_TYPES)}"
        )
    rope_type = ROPE_TYPES[name]
    keys = ("rope_theta", *rope_type.required, *rope_type.optional)
    inside = {k: list(v) if isinstance(v, tuple | list) else v for k, v in spelled.items()}
    inside = {k: v for k, v in inside.items() if v is not None}
    beside = {k: v for k in keys if (v := file_keys.get(k)) is not None}
    if inside.get(ORIGINAL, beside.get(ORIGINAL)) != beside.get(ORIGINAL, inside.get(ORIGINAL)):
        raise ConfigError(
            f"rope_type {name!r}: {ORIGINAL}={inside[ORIGINAL]!r}, but the configuration has "
            f"{ORIGINAL}={beside[ORIGINAL]!r} beside it; keep one of them"
        )
    given = {"rope_theta": DEFAULT_THETA} | beside | inside | {"rope_type": name}
    _check(name, rope_type, keys, given)
    return given


def normalised_by_layer(
    parameters: object,
    layer_types: Sequence[str],
    file_keys: Mapping[str, Mapping[str, Any]],
    *,
    aliases: Mapping[str, str] = ALIASES,
) -> dict[str, dict[str, Any]]:
    """The spelling {layer type: rope parameters} of models whose layer types differ in them.

    `file_keys[layer_type]` are keys beside the dict that hold for that type, or the family's
    defaults (rope_theta). A type that is left out, or None, is made of them alone.
    Raises ConfigError for a dict that is not by layer type, and as `normalised`, naming the type.
    """
    if parameters is not None and not isinstance(parameters, Mapping):
        raise ConfigError(f"rope_parameters={parameters!r}: expected a dict by layer type or None")
    unknown = [k for k in parameters or {} if k not in layer_types]
    if unknown:
        raise ConfigError(
            f"rope_parameters has {unknown}{did_you_mean(str(unknown[0]), layer_types)}; this "
            f"model family takes one dict of parameters for each of {list(layer_types)}"
        )
    found = {}
    for layer_type in layer_types:
        given = (parameters or {}).get(layer_type)
        try:
            found[layer_type] = normalised(given, file_keys.get(layer_type, {}), aliases=aliases)
        except ConfigError as problem:
            raise ConfigError(f"rope_parameters[{layer_type!r}]: {problem}") from None
    return found


def check_fits(parameters: Mapping[str, Any], head_dim: int, *, partial: bool) -> None:
    """Raise ConfigError where normalised parameters, by layer type or not, do not fit the heads.

    `partial`: the model family leaves features past partial_rotary_factor as they are.
    """
    by_layer = {"": parameters} if "rope_type" in parameters else parameters
    for layer_type, own in by_layer.items():
        problem = _misfit(own, head_dim, partial)
        if problem:
            where = f"rope_parameters[{layer_type!r}]: " if layer_type else ""
            raise ConfigError(f"{where}rope_type {own['rope_type']!r}: {problem}")


def _misfit(parameters: Mapping[str, Any], head_dim: int, partial: bool) -> str | None:
    kind, share = ROPE_TYPES[parameters["rope_type"]], parameters.get(PARTIAL, 1.0)
    if kind.whole_head:
        return kind.fits(parameters, head_dim)
    if share < 1 and not partial:
        return (
            f"{PARTIAL}={share} is not supported by this model family; the only value allowed is "
            "1.0"
        )
    R = rotated_features(parameters, head_dim)
    if R < 2 or R % 2:
        return (
            f"{PARTIAL}={share} of head_dim={head_dim} is {R} features; it must be an even number "
            f"from 2 to {head_dim}"
        )
    return kind.fits(parameters, R)


def _check(name: str, kind: RopeType, keys: tuple[str, ...], given: dict[str, Any]) -> None:
    missing = [k for k in kind.required if k not in given]
    unknown = [k for k in given if k not in (*keys, "rope_type")]
    if missing or unknown:
        hint = did_you_mean(str(unknown[0]), keys) if unknown else ""
        found = (f"missing {missing}" if missing else "", f"unknown {unknown}" if unknown else "")
        raise ConfigError(
            f"rope_type {name!r}: {' and '.join(filter(None, found))}{hint}; it takes {list(keys)}"
        )
    for key in keys:
        allowed, words = LIMITS.get(key, POSITIVE)
        if key in given and not allowed(given[key]):
            raise ConfigError(f"rope_type {name!r}: {key}={given[key]!r} must be {words}")
    problem = kind.check(given)
    if problem:
        raise ConfigError(f"rope_type {name!r}: {problem}")
