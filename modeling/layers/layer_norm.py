"""LayerNorm as a module: a weight, a bias and one call into the layer_norm op."""

from __future__ import annotations

from typing import ClassVar, overload

import torch
from torch import Tensor, nn

from swathe.kernels.core.registry import AUTO, Choice
from swathe.kernels.layer_norm.api import layer_norm, resolve_layer_norm
from swathe.modeling.policy import KernelModule


class LayerNorm(KernelModule):
    """Shift rows to mean 0, scale them to variance 1, then by weight, plus bias.

    With a residual, returns (norm(x + residual), x + residual) from one pass; `residual=False`
    says that none will come, which lets backends serve that cannot add.
    """

    op: ClassVar[str] = "norm"

    def __init__(self, size: int, eps: float, *, residual: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))
        self.eps, self.residual = eps, residual
        self.reset_parameters()
        self.choice = self.pick(AUTO)

    def reset_parameters(self) -> None:
        """The weight and bias that change nothing."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def pick(self, implementation: str) -> Choice:
        """A backend for the weight's device and dtype."""
        w = self.weight
        return resolve_layer_norm(w, w, implementation, residual=self.residual)

    @overload
    def forward(self, x: Tensor, residual: None = None) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """y, or (y, h) with a residual; see `swathe.layer_norm`."""
        return layer_norm(
            x, self.weight, self.bias, self.eps, residual=residual, implementation=self.choice
        )

    def extra_repr(self) -> str:
        """Sizes and the backend in use."""
        return f"{tuple(self.weight.shape)}, eps={self.eps}, backend={self.choice.backend}"
