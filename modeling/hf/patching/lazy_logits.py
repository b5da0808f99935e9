"""Logits that a language model's head has not computed yet.

In training with labels a patched head answers with LazyLogits. What models do to logits on their
way to the loss (a factor, a tanh cap, a cast to fp32, a slice of positions) is written down; the
loss then needs hidden states and weight alone. Whatever else is asked of them makes them real: the
same tensor, bit for bit, that the head would have given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from swathe.kernels.linear_cross_entropy.op import autocast_dtype

Step = tuple[str, float]
_OPERATORS = (
    *("add", "radd", "sub", "rsub", "pow", "rpow", "rtruediv", "floordiv", "mod", "matmul"),
    *("neg", "abs", "invert", "and", "or", "eq", "ne", "lt", "le", "gt", "ge"),
    *("len", "iter", "setitem", "bool", "float", "int", "array"),
)


class LazyLogits:
    """`head(hidden)` and the steps taken since: (..., V) of a tensor's behaviour.

    Read them before the head's weight changes: an optimizer's step makes them other logits, and
    reading them then raises RuntimeError.
    """

    def __init__(self, hidden: Tensor, head: nn.Linear, steps: tuple[Step, ...] = ()) -> None:
        self.hidden, self.head, self.steps = hidden, head, steps
        self.autocast = autocast_dtype(hidden)
        self.grad = torch.is_grad_enabled()
        self.tensor: Tensor | None = None
        self.version = None if torch.compiler.is_compiling() else head.weight._version

    def real(self) -> Tensor:
        """The logits as a tensor, computed when it is first asked for."""
        if self.tensor is None:
            if self.version is not None and self.version != self.head.weight._version:
                raise RuntimeError(
                    "these logits were never computed, because the loss did not need them, and the "
                    "head's weight has changed since: read them before the optimizer's step, or "
                    "use swathe.patch(model, fused_linear_cross_entropy=False)"
                )
            with torch.set_grad_enabled(self.grad):
                self.tensor = self._computed()
        return self.tensor

    def _computed(self) -> Tensor:
        if self.autocast is None:
            x = nn.Linear.forward(self.head, self.hidden)
        else:
            with torch.autocast(self.hidden.device.type, self.autocast):
                x = nn.Linear.forward(self.head, self.hidden)
        for kind, number in self.steps:
            if kind == "mul":
                x = x * number
            elif kind == "div":
                x = x / number
            else:
                x = x.tanh() if kind == "tanh" else x.float()
        return x

    def scale_and_softcap(self) -> tuple[float, float | None] | None:
        """The steps as linear_cross_entropy takes them; None if they are nothing of the kind."""
        before, after, capped = 1.0, 1.0, False
        for kind, number in self.steps:
            if kind == "tanh":
                if capped:
                    return None
                capped = True
            elif kind in ("mul", "div"):
                factor = number if kind == "mul" else 1.0 / number
                before, after = (before, after * factor) if capped else (before * factor, after)
        if not capped:
            return before, None
        return (before * after, after) if after > 0 else None

    def _then(self, kind: str, number: Any) -> Any:
        plain = type(number) in (int, float) and (number != 0 or kind != "div")
        if self.tensor is not None or not plain:
            x = self.real()
            return x * number if kind == "mul" else x / number
        return LazyLogits(self.hidden, self.head, (*self.steps, (kind, number)))

    def __mul__(self, other: Any) -> Any:
        return self._then("mul", other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return self._then("div", other)

    def tanh(self) -> Any:
        """torch.tanh."""
        if self.tensor is not None:
            return self.tensor.tanh()
        return LazyLogits(self.hidden, self.head, (*self.steps, ("tanh", 0.0)))

    def float(self) -> Any:
        """A cast to fp32."""
        if self.tensor is not None:
            return self.tensor.float()
        if self.dtype == torch.float32:
            return self
        return LazyLogits(self.hidden, self.head, (*self.steps, ("float", 0.0)))

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Tensor.to; a cast to fp32 and a move to where they are keep them lazy."""
        if self.tensor is None and len(args) == 1 and not kwargs:
            if args[0] == self.device or args[0] == self.dtype:
                return self
            if args[0] is torch.float32:
                return self.float()
        return self.real().to(*args, **kwargs)

    def contiguous(self) -> Any:
        """Themselves."""
        return self

    def __getitem__(self, index: Any) -> Any:
        parts = index if isinstance(index, tuple) else (index,)
        positions = len(parts) < self.ndim or (len(parts) == self.ndim and parts[-1] == slice(None))
        slices = all(isinstance(part, slice) for part in parts)
        if self.tensor is not None or not (positions and slices):
            return self.real()[index]
        return LazyLogits(self.hidden[index], self.head, self.steps)

    @property
    def shape(self) -> torch.Size:
        """(..., V)."""
        return torch.Size((*self.hidden.shape[:-1], self.head.weight.shape[0]))

    def size(self, dim: int | None = None) -> Any:
        """Tensor.size."""
        return self.shape if dim is None else self.shape[dim]

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self.hidden.dim()

    def dim(self) -> int:
        """Number of dimensions."""
        return self.hidden.dim()

    @property
    def dtype(self) -> torch.dtype:
        """What the head's logits would have."""
        if any(kind == "float" for kind, _ in self.steps):
            return torch.float32
        return self.autocast or self.hidden.dtype

    @property
    def device(self) -> torch.device:
        """Where the hidden states are."""
        return self.hidden.device

    def __repr__(self) -> str:
        state = "not computed" if self.tensor is None else "computed"
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, {state})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.real(), name)

    __hash__ = object.__hash__

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.tanh and len(args) == 1 and not kwargs:
            return args[0].tanh()
        return func(*tree_map(_real, args), **tree_map(_real, kwargs or {}))


def _real(value: Any) -> Any:
    return value.real() if isinstance(value, LazyLogits) else value


def _operator(name: str) -> Callable[..., Any]:
    def operate(self: LazyLogits, *args: Any) -> Any:
        return getattr(self.real(), name)(*tree_map(_real, args))

    return operate


for _name in _OPERATORS:
    setattr(LazyLogits, f"__{_name}__", _operator(f"__{_name}__"))
