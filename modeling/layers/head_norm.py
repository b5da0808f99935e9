"""Queries and keys normed head by head before they are turned: Qwen3's and Gemma3's attention.

Norm and rotation are one call into the op qk_norm_rotary.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from swathe.kernels.core.registry import AUTO, Choice
from swathe.kernels.qk_norm_rotary.api import (
    NormCasting,
    qk_norm_rotary,
    resolve_qk_norm_rotary,
)
from swathe.modeling.layers.embedding import Rotation
from swathe.modeling.policy import KernelModule


class HeadNorm(nn.Module):
    """The weight (head_dim,) of an RMSNorm over each head; NormedRotation applies it."""

    def __init__(self, head_dim: int, eps: float, *, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(head_dim))
        self.eps, self.offset = eps, offset
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The weight that changes nothing: 1 - offset."""
        nn.init.constant_(self.weight, 1.0 - self.offset)

    def extra_repr(self) -> str:
        """Size and epsilon."""
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class NormedRotation(KernelModule):
    """Norm over each head of q and k, then rotary, with HF's roundings; `casting` is the norm's."""

    op: ClassVar[str] = "rope"

    def __init__(self, q_norm: HeadNorm, k_norm: HeadNorm, casting: NormCasting) -> None:
        super().__init__()
        # in a tuple: parameters stay where checkpoints have them, in the attention module
        self._norms = (q_norm, k_norm)
        self.casting: NormCasting = casting
        self.choice = self.pick(AUTO)

    def sample(self) -> Tensor:
        """The norms' weight: this module has no parameter of its own."""
        return self._norms[0].weight

    def pick(self, implementation: str) -> Choice:
        """A backend for the weights' device and dtype."""
        weight = self.sample()
        q = weight.new_empty(1, 1, 1, weight.shape[0])
        return resolve_qk_norm_rotary(q, weight, q[0, 0], implementation)

    def forward(self, q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """q (B, H, T, D) and k (B, K, T, D), normed and turned."""
        q_norm, k_norm = self._norms
        return qk_norm_rotary(
            q,
            k,
            q_norm.weight,
            k_norm.weight,
            q_norm.eps,
            rotation.cos,
            rotation.sin,
            rotary_dim=rotation.cos.shape[-1],
            offset=q_norm.offset,
            norm_casting=self.casting,
            casting="llama",
            implementation=self.choice,
        )

    def extra_repr(self) -> str:
        """The backend in use."""
        return f"backend={self.choice.backend}"
