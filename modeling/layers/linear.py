"""Projections: nn.Linear whose weights, for few rows on a CPU, are read at the speed of memory.

A Linear is an nn.Linear in everything else: parameters, isinstance, gradients, hooks. `project`
runs several of the same input in one call where nothing hangs on any of them. Weights that fit into
caches, many rows, and all that needs gradients go to torch without a detour.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from swathe.kernels.core.cpp import is_noting
from swathe.kernels.core.registry import AUTO, Choice
from swathe.kernels.linear.api import linear, resolve_linear
from swathe.modeling.policy import KernelModule

ROWS = 16  # at most so many are few
SMALL = 1 << 16  # elements of a weight that is read from a cache
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Linear(KernelModule, nn.Linear):
    """x @ weight.T + bias by the backend that was chosen."""

    op: ClassVar[str] = "linear"

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        # elements of an input with few rows; 0 for a weight that gains nothing
        self.few = ROWS * self.in_features if self.weight.numel() > SMALL else 0
        self.choice = self.pick(AUTO)

    def pick(self, implementation: str) -> Choice:
        """A backend for the weight's device and dtype."""
        return resolve_linear(self.weight, implementation)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        if _to_torch(x, self.few):
            return F.linear(x, self.weight, self.bias)
        return linear(x, (self.weight,), (self.bias,), implementation=self.choice)[0]

    def extra_repr(self) -> str:
        """Sizes and the backend in use."""
        return f"{nn.Linear.extra_repr(self)}, backend={self.choice.backend}"


def project(x: Tensor, *projections: Any) -> tuple[Tensor, ...]:
    """Every projection, a module each, of x (..., features)."""
    first = projections[0]
    if _to_torch(x, getattr(first, "few", 0)) or not all(_is_bare(p, first) for p in projections):
        return tuple([p(x) for p in projections])
    weights = tuple(p.weight for p in projections)
    return linear(x, weights, tuple(p.bias for p in projections), implementation=first.choice)


def _to_torch(x: Tensor, few: int) -> bool:
    # sizes in a graph may be symbols, which a comparison would make numbers
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return True
    return x.numel() > few and not is_noting()  # a program holds nothing of torch's


def _is_bare(module: Any, like: Any) -> bool:
    """Whether a call of `module` is its weights and nothing else, by the same backend."""
    same = type(module) is Linear and module.choice.backend == like.choice.backend
    return same and beside_weights(module) is None


def beside_weights(projection: nn.Module) -> str | None:
    """What a call of a projection is, or does, besides its weight and bias; None for nothing."""
    if type(projection) not in (Linear, nn.Linear):
        kind = f"{type(projection).__module__}.{type(projection).__qualname__}"
        return f"is a {kind}, not a plain torch.nn.Linear"
    if "forward" in vars(projection):
        return "has a forward that was replaced on the instance"
    for name in _HOOKS:
        if getattr(projection, name):
            return f"has {name[1:].replace('_', ' ')}"
    if torch_module._has_any_global_hook():
        return "is called under hooks on all modules"
    return None
