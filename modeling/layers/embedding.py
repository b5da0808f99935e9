"""Rotary position embedding as a module: cos and sin for given positions, and who applies them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from swathe.kernels.core.registry import AUTO, Choice
from swathe.kernels.rotary.api import resolve_rotary, rotary
from swathe.modeling.policy import KernelModule
from swathe.modeling.rope import ROPE_TYPES


class Rotation(NamedTuple):
    """The angles of one forward pass, made once, and the backend that turns queries and keys."""

    cos: Tensor
    sin: Tensor
    choice: Choice

    def __call__(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, H, T, D) and k (B, K, T, D) rotated, with HF's roundings."""
        return rotary(q, k, self.cos, self.sin, casting="llama", implementation=self.choice)


class RotaryEmbedding(KernelModule):
    """cos and sin (B or 1, T, D) for positions (B or 1, T): fp32, rounded at the end."""

    op: ClassVar[str] = "rope"
    inv_freq: Tensor

    def __init__(self, parameters: dict[str, Any], head_dim: int) -> None:
        super().__init__()
        self.rope, self.head_dim = parameters, head_dim
        self.register_buffer("inv_freq", None, persistent=False)
        self.reset_buffers(None)
        self.choice = self.pick(AUTO)

    def pick(self, implementation: str) -> Choice:
        """A backend for the frequencies' device."""
        like = self.inv_freq.new_empty(1, 1, 1, self.head_dim)
        return resolve_rotary(like, like[0, 0], implementation)

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

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """The rotation for `positions`, cos and sin in `dtype`."""
        with torch.no_grad():
            angles = positions[..., None].float() * self.inv_freq
            angles = torch.cat((angles, angles), dim=-1)
            cos, sin = (
                (angles.cos() * self.factor).to(dtype),
                (angles.sin() * self.factor).to(dtype),
            )
            return Rotation(cos, sin, self.choice)

    def extra_repr(self) -> str:
        """The backend in use."""
        return f"backend={self.choice.backend}"
