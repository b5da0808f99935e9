"""The gated MLP: three projections around one call into the gated_mlp_act op."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from swathe.kernels.core.registry import AUTO, Choice
from swathe.kernels.gated_mlp_act.api import gated_mlp_act, resolve_gated_mlp_act
from swathe.modeling.layers.linear import Linear, project
from swathe.modeling.policy import KernelModule


class GatedMLP(KernelModule):
    """down(act(gate(x)) * up(x)), under HF's parameter names and with its roundings."""

    op: ClassVar[str] = "mlp"

    def __init__(self, hidden_size: int, intermediate_size: int, act: str, bias: bool) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)
        self.act = act
        self.choice = self.pick(AUTO)

    def pick(self, implementation: str) -> Choice:
        """A backend for the projections' device and dtype."""
        weight = self.gate_proj.weight
        return resolve_gated_mlp_act(weight[:, 0], implementation, act=self.act, casting="llama")

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, hidden) to (B, T, hidden)."""
        gate, up = project(x, self.gate_proj, self.up_proj)
        gated = gated_mlp_act(
            gate,
            up,
            act=self.act,
            casting="llama",
            implementation=self.choice,
        )
        return self.down_proj(gated)

    def extra_repr(self) -> str:
        """The activation and the backend in use."""
        return f"act={self.act}, backend={self.choice.backend}"


class PackedMLP(KernelModule):
    """The gated MLP whose first two projections are one, `gate_up_proj`: [gate | up]."""

    op: ClassVar[str] = "mlp"

    def __init__(self, hidden_size: int, intermediate_size: int, act: str) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)
        self.act = act
        self.choice = self.pick(AUTO)

    def pick(self, implementation: str) -> Choice:
        """A backend for the projections' device and dtype."""
        return resolve_gated_mlp_act(
            self.gate_up_proj.weight[:, 0],
            implementation,
            act=self.act,
            casting="llama",
            packed="halves",
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, hidden) to (B, T, hidden)."""
        gated = gated_mlp_act(
            self.gate_up_proj(x), act=self.act, casting="llama", implementation=self.choice
        )
        return self.down_proj(gated)

    def extra_repr(self) -> str:
        """The activation and the backend in use."""
        return f"act={self.act}, backend={self.choice.backend}"
