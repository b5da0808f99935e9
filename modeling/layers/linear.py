"""Projections: nn.Linear whose weights, for few rows on a CPU, are read at the speed of memory.

A Linear is an nn.Linear in everything else: parameters, isinstance, gradients, hooks. `project`
runs several of the same input in one call where nothing hangs on any of them. Weights that fit into
caches, many rows, and all that needs gradients go to torch without a detour. While `reading`, a
Linear computes with weights in int8 that lie beside its own, at any number of rows.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

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


class Int8(NamedTuple):
    """A weight in int8 (N, K), its scales (N,), and the backend that reads them."""

    weight: Tensor
    scales: Tensor
    choice: Choice


class _Here(threading.local):
    int8: Mapping[nn.Module, Int8] | None = None


_here = _Here()


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
        int8 = int8_of(self)
        if int8 is not None:
            return _read(x, (self,), (int8,))[0]
        if _to_torch(x, self.few):
            return F.linear(x, self.weight, self.bias)
        return linear(x, (self.weight,), (self.bias,), implementation=self.choice)[0]

    def extra_repr(self) -> str:
        """Sizes and the backend in use."""
        return f"{nn.Linear.extra_repr(self)}, backend={self.choice.backend}"


@contextmanager
def reading(int8: Mapping[nn.Module, Int8]) -> Iterator[None]:
    """Have each Linear in `int8` compute with what it has there, in this thread."""
    before, _here.int8 = _here.int8, int8
    try:
        yield
    finally:
        _here.int8 = before


def being_read() -> Mapping[nn.Module, Int8] | None:
    """What this thread is `reading`."""
    return _here.int8


def int8_of(module: nn.Module) -> Int8 | None:
    """What the module computes with instead of its weight, if this thread is `reading` it."""
    if torch.compiler.is_compiling() or _here.int8 is None:
        return None
    return _here.int8.get(module)


def _read(x: Tensor, projections: tuple[Any, ...], int8: tuple[Int8, ...]) -> tuple[Tensor, ...]:
    return linear(
        x,
        tuple(held.weight for held in int8),
        tuple(p.bias for p in projections),
        scales=tuple(held.scales for held in int8),
        implementation=int8[0].choice,
    )


def project(x: Tensor, *projections: Any) -> tuple[Tensor, ...]:
    """Every projection, a module each, of x (..., features)."""
    first = projections[0]
    small = int8_of(first) is None and _to_torch(x, getattr(first, "few", 0))
    if small or not all(_is_bare(p, first) for p in projections):
        return tuple([p(x) for p in projections])
    int8 = tuple(held for p in projections if (held := int8_of(p)) is not None)
    if int8:
        return _read(x, projections, int8)
    weights = tuple(p.weight for p in projections)
    return linear(x, weights, tuple(p.bias for p in projections), implementation=first.choice)


def _to_torch(x: Tensor, few: int) -> bool:
    # sizes in a graph may be symbols, which a comparison would make numbers
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return True
    return x.numel() > few and not is_noting()  # a program holds nothing of torch's


def _is_bare(module: Any, like: Any) -> bool:
    """Whether a call of `module` is its weights and nothing else, of the same kind and backend."""
    if type(module) is not Linear or module.choice.backend != like.choice.backend:
        return False
    alike = (int8_of(module) is None) == (int8_of(like) is None)
    return alike and beside_weights(module) is None


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
