"""Rotary position embedding: the parameters of each type and its inverse frequencies.

    inv_freq[i] = theta^(-2 i / D), i < D / 2, then changed by the type's own rule
    angle[b, t, i] = position[b, t] * inv_freq[i]

Dtypes   frequencies and angles are fp32 whatever the model's dtype; cos and sin are rounded to the
         activations' dtype before the op rotary turns queries and keys by them, as HF does.
Source   Su et al. 2021, arXiv:2104.09864; type "llama3" is Llama 3.1's own frequency rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swathe.kernels.core.errors import did_you_mean
from swathe.modeling.errors import ConfigError

Frequencies = tuple[Tensor, float]
DEFAULT_THETA = 10000.0


@dataclass(frozen=True)
class RopeType:
    """One rope type; `frequencies(parameters, head_dim, device)` is (inv_freq, cos/sin factor).

    `required` and `optional` are its parameters beside rope_type and rope_theta, all numbers.
    """

    frequencies: Callable[[Mapping[str, Any], int, torch.device | None], Frequencies]
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    check: Callable[[Mapping[str, Any]], str | None] = lambda parameters: None


def default_frequencies(
    parameters: Mapping[str, Any], head_dim: int, device: torch.device | None
) -> Frequencies:
    """theta^(-2 i / head_dim)."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float, device=device) / head_dim
    return 1.0 / (parameters["rope_theta"] ** exponent), 1.0


def llama3_frequencies(
    parameters: Mapping[str, Any], head_dim: int, device: torch.device | None
) -> Frequencies:
    """Long waves are slowed by `factor`, short ones kept, those between interpolated."""
    inv_freq, _ = default_frequencies(parameters, head_dim, device)
    factor, low, high = (parameters[k] for k in ("factor", "low_freq_factor", "high_freq_factor"))
    original = parameters["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - low) / (high - low)
    mixed = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    long = torch.where(wavelength > original / low, inv_freq / factor, inv_freq)
    between = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(between, mixed, long), 1.0


def _check_llama3(p: Mapping[str, Any]) -> str | None:
    if p["factor"] < 1:
        return f"factor={p['factor']} must be at least 1"
    if not 0 < p["low_freq_factor"] < p["high_freq_factor"]:
        return (
            f"low_freq_factor={p['low_freq_factor']} and high_freq_factor={p['high_freq_factor']} "
            "must satisfy 0 < low < high"
        )
    if p["original_max_position_embeddings"] < 1:
        return "original_max_position_embeddings must be at least 1"
    return None


ROPE_TYPES: dict[str, RopeType] = {
    "default": RopeType(default_frequencies),
    "llama3": RopeType(
        llama3_frequencies,
        required=(
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ),
        check=_check_llama3,
    ),
}


def register_rope(name: str, rope_type: RopeType) -> None:
    """Make a rope type usable from config.json; its parameters are validated like ours."""
    if name in ROPE_TYPES:
        raise ValueError(f"rope_type {name!r} exists already; choose another name")
    ROPE_TYPES[name] = rope_type


def normalised(parameters: object, file_keys: Mapping[str, Any]) -> dict[str, Any]:
    """HF's v5 spelling of any rope spelling, validated; the caller's dict is never changed.

    `file_keys` are legacy keys beside it: rope_theta, original_max_position_embeddings. A value
    inside the dict wins over them. Raises ConfigError naming the key.
    """
    if parameters is not None and not isinstance(parameters, Mapping):
        raise ConfigError(
            f"rope_parameters={parameters!r}: expected a dict such as {{'rope_type': 'default', "
            "'rope_theta': 10000.0}} or None"
        )
    given = {k: v for k, v in (parameters or {}).items() if k != "type" and v is not None}
    given.setdefault("rope_type", (parameters or {}).get("type", "default"))
    name = given["rope_type"]
    if not isinstance(name, str) or name not in ROPE_TYPES:
        raise ConfigError(
            f"unknown rope_type {name!r}{did_you_mean(str(name), ROPE_TYPES)}; "
            f"known: {sorted(ROPE_TYPES)}"
        )
    rope_type = ROPE_TYPES[name]
    keys = ("rope_theta", *rope_type.required, *rope_type.optional)
    given = {k: v for k in keys if (v := file_keys.get(k)) is not None} | given
    given.setdefault("rope_theta", DEFAULT_THETA)
    _check(name, rope_type, keys, given)
    return given


def _check(name: str, kind: RopeType, keys: tuple[str, ...], given: dict[str, Any]) -> None:
    missing = [k for k in kind.required if k not in given]
    unknown = [k for k in given if k not in (*keys, "rope_type", "partial_rotary_factor")]
    if missing or unknown:
        raise ConfigError(
            f"rope_type {name!r}: "
            + " and ".join(
                part
                for part in (
                    f"missing {missing}" if missing else "",
                    f"unknown {unknown}" if unknown else "",
                )
                if part
            )
            + f"; it takes {list(keys)}"
        )
    for key in keys:
        value = given.get(key, 1)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 < value < math.inf
        ):
            raise ConfigError(
                f"rope_type {name!r}: {key}={value!r} must be a finite number above 0"
            )
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            f"rope_type {name!r}: partial_rotary_factor={given['partial_rotary_factor']} is not "
            "supported by this model family; the only value allowed is 1.0"
        )
    problem = kind.check(given)
    if problem:
        raise ConfigError(f"rope_type {name!r}: {problem}")
