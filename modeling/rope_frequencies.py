"""The inverse frequencies of each rope type: what its parameters do to theta^(-2 i / R).

    inv_freq[i] = theta^(-2 i / R), i < R / 2, R = int(head_dim * partial_rotary_factor)

default       as it stands
linear        / factor
dynamic       * growth^(-2 i / (R - 2)), growth = 1 + factor (L / M - 1): theta grows with L
yarn          / factor where a wave turns less than beta_slow times in the original context, kept
              where it turns more than beta_fast times, a linear ramp between
longrope      / short_factor[i] while L <= the original context, else / long_factor[i]
llama3        / factor where the wave is long, kept where it is short, interpolated between
proportional  theta^(-2 i / head_dim) / factor for the first pairs, 0 for the rest of the head

L is a length and M is max_position_embeddings, see modeling/layers/embedding.py. yarn and longrope
also multiply cos and sin, by the second result of their functions.

Dtypes   fp32, whatever torch's default is while a model is built.
Source   linear: kaiokendev 2023; dynamic: NTK-aware scaling, bloc97 and emozilla 2023; yarn: Peng
         et al. 2023, arXiv:2309.00071, sections 3.2 to 3.4; longrope: Ding et al. 2024,
         arXiv:2402.13753; llama3: Llama 3.1; proportional: Gemma 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Parameters = Mapping[str, Any]
Frequencies = tuple[Tensor, float]
Device = torch.device | None


def rotated_features(parameters: Parameters, head_dim: int) -> int:
    """R, how many features of a head turn; rounded down as HF does."""
    return int(head_dim * parameters.get("partial_rotary_factor", 1.0))


def _powers(theta: float, count: int, over: int, device: Device) -> Tensor:
    """theta^(2 i / over) for i < count."""
    exponent = torch.arange(0, 2 * count, 2, dtype=torch.float, device=device) / over
    return float(theta) ** exponent


def _theta_powers(parameters: Parameters, head_dim: int, device: Device) -> Tensor:
    R = rotated_features(parameters, head_dim)
    return _powers(parameters["rope_theta"], R // 2, R, device)


def default_frequencies(parameters: Parameters, head_dim: int, device: Device) -> Frequencies:
    """theta^(-2 i / R)."""
    return 1.0 / _theta_powers(parameters, head_dim, device), 1.0


def linear_frequencies(parameters: Parameters, head_dim: int, device: Device) -> Frequencies:
    """Every wave is slowed by `factor`."""
    return 1.0 / _theta_powers(parameters, head_dim, device) / float(parameters["factor"]), 1.0


def dynamic_at_length(inv_freq: Tensor, parameters: Parameters, length: Tensor) -> Tensor:
    """The default frequencies with the theta that a length above M asks for."""
    M = parameters["max_position_embeddings"]
    growth = 1.0 + float(parameters["factor"]) * (length.float().clamp(min=M) / M - 1.0)
    pairs = len(inv_freq)
    exponent = torch.arange(pairs, dtype=torch.float, device=length.device) / (pairs - 1)
    return inv_freq / growth**exponent


def yarn_frequencies(parameters: Parameters, head_dim: int, device: Device) -> Frequencies:
    """Long waves are slowed by `factor`, short ones kept, and cos and sin are scaled up."""
    R, factor = rotated_features(parameters, head_dim), float(parameters["factor"])
    low, high = (
        _pair_that_turns(parameters, R, parameters.get(key, default))
        for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0))
    )
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, R - 1)
    width = high - low or 0.001
    ramp = (torch.arange(R // 2, dtype=torch.float, device=device) - low) / width
    kept = 1 - ramp.clamp(0, 1)
    powers = _theta_powers(parameters, head_dim, device)
    inv_freq = 1.0 / (factor * powers) * (1 - kept) + 1.0 / powers * kept
    return inv_freq, _yarn_scale(parameters, factor)


def _pair_that_turns(parameters: Parameters, R: int, turns: float) -> float:
    """The pair (fractional) whose wave turns so often within the original context."""
    waves = parameters["original_max_position_embeddings"] / (turns * 2 * math.pi)
    return R * math.log(waves) / (2 * math.log(parameters["rope_theta"]))


def _yarn_scale(parameters: Parameters, factor: float) -> float:
    """attention_factor, or what factor, mscale and mscale_all_dim make of it."""

    def scale(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if "attention_factor" in parameters:
        return float(parameters["attention_factor"])
    mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    # 0 stands for absent in files
    return scale(mscale) / scale(all_dim) if mscale and all_dim else scale(1.0)


def longrope_frequencies(parameters: Parameters, head_dim: int, device: Device) -> Frequencies:
    """(2, R / 2): the frequencies of short and of long contexts; cos and sin are scaled up."""
    factors = torch.tensor(
        [parameters["short_factor"], parameters["long_factor"]], dtype=torch.float, device=device
    )
    inv_freq = 1.0 / (factors * _theta_powers(parameters, head_dim, device))
    original = parameters["original_max_position_embeddings"]
    factor = parameters.get("factor", parameters["max_position_embeddings"] / original)
    if "attention_factor" in parameters:
        return inv_freq, float(parameters["attention_factor"])
    if factor <= 1:
        return inv_freq, 1.0
    return inv_freq, math.sqrt(1 + math.log(factor) / math.log(original))


def longrope_at_length(inv_freq: Tensor, parameters: Parameters, length: Tensor) -> Tensor:
    """The frequencies of long contexts where the length exceeds the original one."""
    long = length > parameters["original_max_position_embeddings"]
    return torch.where(long, inv_freq[1], inv_freq[0])


def llama3_frequencies(parameters: Parameters, head_dim: int, device: Device) -> Frequencies:
    """Long waves are slowed by `factor`, short ones kept, those between interpolated."""
    inv_freq, _ = default_frequencies(parameters, head_dim, device)
    factor, low, high, original = (
        float(parameters[key])
        for key in (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        )
    )
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - low) / (high - low)
    mixed = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    long = torch.where(wavelength > original / low, inv_freq / factor, inv_freq)
    between = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(between, mixed, long), 1.0


def proportional_frequencies(parameters: Parameters, head_dim: int, device: Device) -> Frequencies:
    """The first pairs of a whole head turn, the others have frequency 0."""
    share = parameters.get("partial_rotary_factor", 1.0)
    pairs = int(share * head_dim // 2)
    turning = 1.0 / _powers(parameters["rope_theta"], pairs, head_dim, device)
    still = turning.new_zeros(head_dim // 2 - pairs)
    return torch.cat((turning, still)) / float(parameters.get("factor", 1.0)), 1.0
