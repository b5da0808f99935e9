"""What a rotary function of transformers computes, found by calling it.

Some forty functions, nearly all of one name, turn q and k in a dozen ways. With the tables fixed
such a function is linear in q and in k; with q and k fixed it is affine in the tables. So its
values on unit vectors, once with no angle and once for each entry of the tables alone, say all of
it: what agrees with the `rotary` op there is that op. That it is linear is seen on integers, which
every dtype involved adds and multiplies exactly.

Turning   the features that are turned are a head's first or last; pairs are halves or neighbours;
          DeepSeek-V3 reads neighbours and writes halves; nanochat turns the other way.
Tables    "whole": an entry for each feature; "compact": one for each pair; "first": an entry for
          each feature, of which only the first half is read.
Layouts   the axis of heads, by the dimensions of q and of the tables and by `unsqueeze_dim`.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor

from swathe.kernels.rotary.api import rotary

Table = Literal["whole", "compact", "first"]
Layout = tuple[int, int, Any]  # dimensions of q, of the tables, and the value of unsqueeze_dim
_ERRORS = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, AssertionError)
_D = 12  # features of a head that is probed, and widths of tables that tell all forms apart
_WIDTHS = (12, 8, 6, 4)
_B, _H, _S = 2, 3, 5  # all different, and none divides another: no wrong axis can broadcast


@dataclass(frozen=True)
class Turning:
    """How the pairs of a head are found, turned and written."""

    tail: bool  # the last features of a head are turned, not its first
    table: Table
    interleaved: bool  # pairs are neighbours
    regrouped: bool  # neighbours are read, halves are written
    sign: int  # -1: the other way round

    def dim(self, width: int) -> int:
        """Features that tables of `width` turn."""
        return 2 * width if self.table == "compact" else width

    def tables(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """The tables that the op takes for these."""
        if self.table == "first":
            half = cos.shape[-1] // 2
            cos, sin = cos[..., :half], sin[..., :half]
        return cos, -sin if self.sign < 0 else sin

    def serves(self, features: int, width: int) -> bool:
        """Whether heads of so many features can be turned by tables of this width."""
        R = self.dim(width)
        return R % 2 == 0 and (2 <= R <= features) and (features == R or not self.regrouped)

    def __call__(
        self, q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, implementation: str = "auto"
    ) -> tuple[Tensor, Tensor | None]:
        """q and k (B, H, S, D) turned, k None where it is; tables (S, W) or (B or 1, S, W)."""
        R = self.dim(cos.shape[-1])
        cos, sin = self.tables(cos, sin)
        start = q.shape[-1] - R if self.tail else 0
        q_in, k_in = self._read(q, start), None if k is None else self._read(k, start)
        pairs = {"interleaved": self.interleaved and not self.regrouped, "rotary_dim": R}
        found: Any = rotary(q_in, k_in, cos, sin, implementation=implementation, **pairs)  # type: ignore[call-overload]
        both: Any = (found, None) if k is None else found
        q_out, k_out = both
        if start:
            q_out = torch.cat((q[..., :start], q_out), -1)
            if k is not None:
                k_out = torch.cat((k[..., :start], k_out), -1)
        return q_out, k_out

    def _read(self, x: Tensor, start: int) -> Tensor:
        x = x[..., start:] if start else x
        return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) if self.regrouped else x


@dataclass(frozen=True)
class RotaryFunction:
    """A function that is a form of rotary: its parameters' roles and what it does with them."""

    function: FunctionType
    parameters: tuple[str, ...]
    turned: tuple[str, ...]  # one or two
    tables: tuple[str, ...]  # cos and sin, or one that is complex
    axis: str | None  # the parameter that says where the axis of heads is
    axis_default: Any
    turning: Turning
    partial: bool  # tables may reach fewer features than a head has
    layouts: dict[Layout, int]  # the axis of heads
    promotes: bool  # the result has the wider dtype of x and the tables, else that of x
    alone: Literal["tuple", "tensor"] | None  # what is returned where the second of two is None

    def __hash__(self) -> int:
        return hash(self.function)


@lru_cache
def read(function: FunctionType) -> RotaryFunction | str:
    """What `function` computes, or why that is no form of the `rotary` op.

    Runs it on small tensors on the CPU, without gradients.
    """
    roles = _roles(function)
    if isinstance(roles, str):
        return roles
    with torch.no_grad():
        return _Probe(function, *roles).result()


def may_be_rotary(function: Any) -> bool:
    """Whether the parameters are those of a rotary function: tensors, then tables."""
    if not isinstance(function, FunctionType):
        return False
    names = list(inspect.signature(function).parameters)
    return _tables(names) is not None and bool(names.index(_tables(names)[0]))  # type: ignore[index]


def _tables(names: list[str]) -> tuple[str, ...] | None:
    if "cos" in names and "sin" in names:
        return ("cos", "sin")
    return next(((name,) for name in names if name.startswith("freqs_ci")), None)


def _roles(function: FunctionType) -> tuple[Any, ...] | str:
    parameters = inspect.signature(function).parameters
    names = list(parameters)
    tables = _tables(names)
    if tables is None:
        return "it takes no cos and sin"
    first = min(names.index(name) for name in tables)
    turned, after = tuple(names[:first]), [n for n in names[first:] if n not in tables]
    if len(turned) not in (1, 2):
        return f"it turns {len(turned)} tensors ({', '.join(turned)})"
    needed = [n for n in after if parameters[n].default is inspect.Parameter.empty]
    needed = [n for n in needed if parameters[n].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    if needed:
        return f"it needs {needed[0]} as well"
    axis = next((n for n in after if type(parameters[n].default) is int), None)
    default = None if axis is None else parameters[axis].default
    positional = tuple(
        n for n in names if parameters[n].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    )
    return positional, turned, tables, axis, default


@dataclass
class _Probe:
    function: Any
    parameters: tuple[str, ...]
    turned: tuple[str, ...]
    tables: tuple[str, ...]
    axis: str | None
    axis_default: Any

    def result(self) -> RotaryFunction | str:
        start = next(self._layouts_taken(), None)
        if start is None:
            return "it takes no q of (batch, heads, tokens, features) with tables of its tokens"
        agreed = [self._turnings(W, start) for W in _WIDTHS]
        taken = {W: forms for W, forms in zip(_WIDTHS, agreed, strict=True) if forms is not None}
        turning = next((t for t in _TURNINGS if all(t in forms for forms in taken.values())), None)
        if turning is None:
            return "it turns features in a way that rotary has no form of"
        whole = next((W for W in taken if turning.dim(W) == _D), None)
        if whole is None:
            return "it does not turn whole heads"
        partial = all(W in taken for W in _WIDTHS if turning.dim(W) < _D)
        layouts = dict(self._layouts(turning, whole))
        if not layouts:
            return "it is not linear in what it turns"
        if self._takes_fewer_tables(layouts, whole):
            return "it may be given tables of fewer tokens than q has, and turns only those"
        promotes = self._promotes(start, whole)
        if isinstance(promotes, str):
            return promotes
        return RotaryFunction(
            self.function,
            self.parameters,
            self.turned,
            self.tables,
            self.axis,
            self.axis_default,
            turning,
            partial,
            layouts,
            promotes,
            self._alone(turning, start, whole),
        )

    def call(self, xs: Sequence[Tensor | None], cos: Tensor, sin: Tensor, axis: Any) -> Any:
        """The function's own result, None where it refuses these."""
        tables = (cos, sin) if len(self.tables) == 2 else (torch.complex(cos, sin),)
        given: dict[str, Any] = dict(zip(self.turned + self.tables, (*xs, *tables), strict=True))
        if self.axis is not None:
            given[self.axis] = axis
        try:
            return self.function(**given)
        except _ERRORS:
            return None

    def tensors(
        self, xs: Sequence[Tensor | None], cos: Tensor, sin: Tensor, axis: Any
    ) -> list[Tensor]:
        """The turned tensors, as many as were given, else nothing."""
        found = self.call(xs, cos, sin, axis)
        found = found if isinstance(found, tuple | list) else (found,)
        good = len(found) == len(xs) and all(isinstance(y, Tensor) for y in found)
        return list(found) if good else []

    def axes(self) -> list[Any]:
        return [None] if self.axis is None else [self.axis_default, *range(-3, 3)]

    def _layouts_taken(self) -> Iterator[tuple[str, str, Any]]:
        """Axes of q and of the tables for which a call works, with tables of any width."""
        for (x_axes, table_axes), W in itertools.product(_LAYOUTS, _WIDTHS):
            for axis in self.axes():
                xs, cos, sin = _whole_numbers(x_axes, table_axes, W, len(self.turned))
                found = self.tensors(xs, cos, sin, axis)
                if found and all(y.shape == x.shape for y, x in zip(found, xs, strict=True)):
                    yield x_axes, table_axes, axis

    def _turnings(self, W: int, start: tuple[str, str, Any]) -> list[Turning] | None:
        """The forms that agree on every unit vector and every entry of tables of width W.

        None where the function refuses tables of that width.
        """
        x_axes, table_axes, axis = start
        settings = torch.cat((torch.zeros(1, 2 * W), torch.eye(2 * W)))
        # one token for each pair of a feature and a setting of the tables
        rows = torch.eye(_D).repeat_interleave(2 * W + 1, 0).double()[None, None]
        cos, sin = settings.repeat(_D, 1).double().split(W, -1)
        heads = [rows, rows.flip(-2)][: len(self.turned)]
        c, s = (cos[None], sin[None]) if "b" in table_axes else (cos, sin)
        found = self.tensors([_placed(x, x_axes) for x in heads], c, s, axis)
        if not found:
            return None
        k = heads[1] if len(heads) == 2 else None
        return [
            turning
            for turning in _TURNINGS
            if turning.serves(_D, W)
            and _agree(turning(rows, k, cos, sin, "eager"), [_unplaced(y, x_axes) for y in found])
        ]

    def _layouts(self, turning: Turning, W: int) -> Iterator[tuple[Layout, int]]:
        """Every way of calling it that gives what the form gives, on whole numbers."""
        for (x_axes, table_axes), axis in itertools.product(_LAYOUTS, self.axes()):
            xs, cos, sin = _whole_numbers(x_axes, table_axes, W, len(self.turned))
            found = self.tensors(xs, cos, sin, axis)
            heads = [_unplaced(x, x_axes) for x in xs]
            wanted = turning(heads[0], heads[1] if len(heads) == 2 else None, cos, sin, "eager")
            if found and _agree(wanted, [_unplaced(y, x_axes) for y in found]):
                yield (len(x_axes), len(table_axes), axis), x_axes.index("h")

    def _takes_fewer_tables(self, layouts: dict[Layout, int], W: int) -> bool:
        for x_axes, table_axes in _LAYOUTS:
            for axis in self.axes():
                if layouts.get((len(x_axes), len(table_axes), axis)) == x_axes.index("h"):
                    xs, cos, sin = _whole_numbers(x_axes, table_axes, W, len(self.turned))
                    if self.tensors(xs, cos[..., 1:, :], sin[..., 1:, :], axis):
                        return True
        return False

    def _promotes(self, start: tuple[str, str, Any], W: int) -> bool | str:
        kept, promoted = True, True
        for x_dtype, table_dtype in itertools.product((torch.bfloat16, torch.float32), repeat=2):
            x_axes, table_axes, axis = start
            xs, cos, sin = _whole_numbers(x_axes, table_axes, W, len(self.turned))
            narrow = [x.to(x_dtype) for x in xs]
            tables = torch.float32 if len(self.tables) == 1 else table_dtype
            for y in self.tensors(narrow, cos.to(tables), sin.to(tables), axis):
                kept &= y.dtype == x_dtype
                promoted &= y.dtype == torch.promote_types(x_dtype, table_dtype)
        return not kept if kept or promoted else "the dtype it returns follows no known rule"

    def _alone(
        self, turning: Turning, start: tuple[str, str, Any], W: int
    ) -> Literal["tuple", "tensor"] | None:
        if len(self.turned) == 1:
            return None
        x_axes, table_axes, axis = start
        (x,), cos, sin = _whole_numbers(x_axes, table_axes, W, 1)
        found = self.call([x, None], cos, sin, axis)
        kind: Literal["tuple", "tensor"] = "tuple" if isinstance(found, tuple) else "tensor"
        y = found[0] if isinstance(found, tuple) and len(found) == 2 else found
        wanted = turning(_unplaced(x, x_axes), None, cos, sin, "eager")[0]
        good = isinstance(y, Tensor) and torch.equal(_unplaced(y, x_axes), wanted)
        return kind if good and (kind == "tensor" or found[1] is None) else None


# (batch, heads, tokens, features), and tables with or without a batch
_LAYOUTS = (
    ("bhsd", "bsw"),
    ("bshd", "bsw"),
    ("bhsd", "sw"),
    ("bshd", "sw"),
    ("hsd", "sw"),
    ("shd", "sw"),
)


def _turnings() -> Iterator[Turning]:
    tables: tuple[Table, ...] = ("whole", "first", "compact")
    pairings = ((False, False), (True, False), (True, True))
    for sign, tail, table in itertools.product((1, -1), (False, True), tables):
        for interleaved, regrouped in pairings:
            yield Turning(tail, table, interleaved, regrouped, sign)


_TURNINGS = tuple(_turnings())


def _whole_numbers(
    x_axes: str, table_axes: str, W: int, count: int
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Small integers in fp64 for `count` tensors to be turned and for both tables."""
    sizes = {"b": _B, "h": _H, "s": _S, "d": _D, "w": W}
    draw = torch.Generator().manual_seed(0)

    def numbers(axes: str) -> Tensor:
        shape = [sizes[axis] for axis in axes]
        return torch.randint(-4, 5, shape, generator=draw).double()

    return [numbers(x_axes) for _ in range(count)], numbers(table_axes), numbers(table_axes)


def _agree(wanted: tuple[Tensor, Tensor | None], found: list[Tensor]) -> bool:
    return all(torch.equal(y, z) for y, z in zip(wanted, found, strict=False) if y is not None)


def _placed(x: Tensor, axes: str) -> Tensor:
    """(1, 1, S, D) with the axes that `axes` names, in its order."""
    x = x[0] if "b" not in axes else x
    return x.transpose(-2, -3) if axes.endswith("shd") else x


def _unplaced(x: Tensor, axes: str) -> Tensor:
    """The reverse: (B or 1, H, S, D)."""
    x = x.transpose(-2, -3) if axes.endswith("shd") else x
    return x[None] if "b" not in axes else x
