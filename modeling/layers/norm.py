"""RMSNorm as a module: a weight and one call into the rms_norm op."""

from __future__ import annotations

from typing import ClassVar, overload

import torch
from torch import Tensor, nn

from swathe.kernels.core.registry import AUTO, Choice
from swathe.kernels.norm.api import Casting, resolve_rms_norm, rms_norm
from swathe.modeling.policy import KernelModule


class RMSNorm(KernelModule):
    """Scale rows to unit root mean square, then by `offset + weight`.

    With a residual, returns (norm(x + residual), x + residual) from one pass. `casting` is the
    family's rounding: "llama" for Llama's.
    """

    op: ClassVar[str] = "norm"

    def __init__(
        self, size: int, eps: float, *, offset: float = 0.0, casting: Casting = "llama"
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps, self.offset = eps, offset
        self.casting: Casting = casting
        self.reset_parameters()
        self.choice = self.pick(AUTO)

    def reset_parameters(self) -> None:
        """The weight that changes nothing: 1 - offset."""
        nn.init.constant_(self.weight, 1.0 - self.offset)

    def pick(self, implementation: str) -> Choice:
        """A backend for the weight's device and dtype."""
        w = self.weight
        return resolve_rms_norm(
            w, w, implementation, offset=self.offset, casting=self.casting, residual=True
        )

    @overload
    def forward(self, x: Tensor, residual: None = None) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """y, or (y, h) with a residual; see `swathe.rms_norm`."""
        return rms_norm(
            x,
            self.weight,
            self.eps,
            offset=self.offset,
            casting=self.casting,
            residual=residual,
            implementation=self.choice,
        )

    def extra_repr(self) -> str:
        """Sizes and the backend in use."""
        return f"{tuple(self.weight.shape)}, eps={self.eps}, backend={self.choice.backend}"
