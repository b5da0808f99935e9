"""Rotary position embedding as a module: the frequencies, and cos and sin for given positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from swathe.modeling.rope import ROPE_TYPES


class RotaryEmbedding(nn.Module):
    """cos and sin (B or 1, T, D) for positions (B or 1, T): fp32, rounded at the end."""

    inv_freq: Tensor

    def __init__(self, parameters: dict[str, Any], head_dim: int) -> None:
        super().__init__()
        self.rope, self.head_dim = parameters, head_dim
        self.register_buffer("inv_freq", None, persistent=False)
        self.reset_buffers(None)

    def reset_buffers(self, device: torch.device | None) -> None:
        """Compute the frequencies on `device`; used after a build on the meta device."""
        kind = ROPE_TYPES[self.rope["rope_type"]]
        self.inv_freq, self.factor = kind.frequencies(self.rope, self.head_dim, device)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        unfilled = self.inv_freq.is_meta
        super()._apply(fn, recurse)
        # a model in half precision keeps its frequencies in fp32; off meta they come as garbage
        if unfilled or self.inv_freq.dtype != torch.float32:
            self.reset_buffers(self.inv_freq.device)
        return self

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin in `dtype`."""
        with torch.no_grad():
            angles = positions[..., None].float() * self.inv_freq
            angles = torch.cat((angles, angles), dim=-1)
            return (angles.cos() * self.factor).to(dtype), (angles.sin() * self.factor).to(dtype)
