"""Values in registers: numbers and blocks with Triton's types, rounding and promotion.

Floats are kept in fp32 and rounded to their type after every operation; integers are kept in int64
and checked against their type, so that an int32 that overflows is an error and no wrong address.
A layout says which threads hold which elements; it is carried along and compared, nothing more.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from triton.experimental.gluon import language as real

from support.gluon.schedule import fault
from support.numerics import narrow, widen

Layout = Any
_STORED = {
    "fp32": np.float32,
    "fp16": np.float16,
    "bf16": np.uint16,
    "fp64": np.float64,
    "int1": np.bool_,
    "int8": np.int8,
    "int16": np.int16,
    "int32": np.int32,
    "int64": np.int64,
    "uint8": np.uint8,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
}


def stored_as(dtype: Any) -> type:
    """The numpy type whose bytes are those of a Triton type in memory."""
    if str(dtype) not in _STORED:
        raise fault(f"dtype {dtype} is not emulated; those that are: {', '.join(_STORED)}")
    return _STORED[str(dtype)]


def to_stored(data: np.ndarray, dtype: Any) -> np.ndarray:
    """A register's values as bytes in memory."""
    return narrow(data) if dtype is real.bfloat16 else np.asarray(data).astype(stored_as(dtype))


def from_stored(data: np.ndarray, dtype: Any) -> np.ndarray:
    """Bytes in memory as a register's values, in a copy."""
    if dtype is real.bfloat16:
        return widen(data)
    if dtype.is_floating():
        return data.astype(np.float64 if dtype is real.float64 else np.float32)
    return data.astype(np.bool_ if dtype is real.int1 else np.int64)


class Tensor:
    """A block, or a number, whose shape is then []."""

    __slots__ = ("data", "dtype", "layout")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, data: Any, dtype: Any, layout: Layout = None) -> None:
        self.data, self.dtype, self.layout = data, dtype, layout

    @property
    def shape(self) -> list[int]:
        return list(np.shape(self.data))

    @property
    def numel(self) -> int:
        return int(np.size(self.data))

    def __repr__(self) -> str:
        return f"{self.dtype}{self.shape} {self.data}"

    def to(self, dtype: Any) -> Tensor:
        """The same values rounded to another type; floats lose their fraction as integers."""
        if dtype is self.dtype:
            return self
        if dtype.is_floating():
            return Tensor(rounded(self.data, dtype), dtype, self.layout)
        if dtype is real.int1:
            return Tensor(_as_number(np.not_equal(self.data, 0)), dtype, self.layout)
        data = self.data
        if self.dtype.is_floating():
            if not np.all(np.isfinite(data)):
                raise fault(f"a conversion to {dtype} of a value that is not finite")
            data = _as_number(np.trunc(data).astype(np.int64))
        elif self.dtype is real.int1:
            data = _as_number(np.asarray(data).astype(np.int64))
        return Tensor(in_range(data, dtype, "conversion"), dtype, self.layout)

    def __bool__(self) -> bool:
        if self.shape:
            raise fault("the truth value of a block: `if` and `while` take a number")
        return bool(self.data)

    def __index__(self) -> int:
        raise fault("a number known only at run time where a constexpr is needed")

    def __getitem__(self, at: Any) -> Tensor:
        at = at if isinstance(at, tuple) else (at,)
        out = self
        for axis, one in enumerate(at):
            if one is None:
                out = expand_dims(out, axis)
            elif not (isinstance(one, slice) and one == slice(None)):
                raise fault(f"a block is indexed by None and : alone, given {one}")
        return out

    def __add__(self, other: Any) -> Any:
        return arithmetic(operator.add, self, other)

    def __radd__(self, other: Any) -> Tensor:
        return arithmetic(operator.add, other, self)

    def __sub__(self, other: Any) -> Tensor:
        return arithmetic(operator.sub, self, other)

    def __rsub__(self, other: Any) -> Tensor:
        return arithmetic(operator.sub, other, self)

    def __mul__(self, other: Any) -> Tensor:
        return arithmetic(operator.mul, self, other)

    def __rmul__(self, other: Any) -> Tensor:
        return arithmetic(operator.mul, other, self)

    def __truediv__(self, other: Any) -> Tensor:
        return divide(self, other)

    def __rtruediv__(self, other: Any) -> Tensor:
        return divide(other, self)

    def __floordiv__(self, other: Any) -> Tensor:
        return integral(truncated_quotient, self, other)

    def __rfloordiv__(self, other: Any) -> Tensor:
        return integral(truncated_quotient, other, self)

    def __mod__(self, other: Any) -> Tensor:
        return integral(truncated_remainder, self, other)

    def __rmod__(self, other: Any) -> Tensor:
        return integral(truncated_remainder, other, self)

    def __and__(self, other: Any) -> Tensor:
        return integral(operator.and_, self, other)

    __rand__ = __and__

    def __or__(self, other: Any) -> Tensor:
        return integral(operator.or_, self, other)

    __ror__ = __or__

    def __xor__(self, other: Any) -> Tensor:
        return integral(operator.xor, self, other)

    __rxor__ = __xor__

    def __lshift__(self, other: Any) -> Tensor:
        return integral(operator.lshift, self, other)

    def __rlshift__(self, other: Any) -> Tensor:
        return integral(operator.lshift, other, self)

    def __rshift__(self, other: Any) -> Tensor:
        return integral(operator.rshift, self, other)

    def __rrshift__(self, other: Any) -> Tensor:
        return integral(operator.rshift, other, self)

    def __neg__(self) -> Tensor:
        return arithmetic(operator.sub, 0, self) if self.dtype.is_int() else self * -1.0

    def __invert__(self) -> Tensor:
        return integral(operator.xor, self, True if self.dtype is real.int1 else -1)

    def __lt__(self, other: Any) -> Tensor:
        return compare(operator.lt, self, other)

    def __le__(self, other: Any) -> Tensor:
        return compare(operator.le, self, other)

    def __gt__(self, other: Any) -> Tensor:
        return compare(operator.gt, self, other)

    def __ge__(self, other: Any) -> Tensor:
        return compare(operator.ge, self, other)

    def __eq__(self, other: object) -> Tensor:  # type: ignore[override]
        return compare(operator.eq, self, other)

    def __ne__(self, other: object) -> Tensor:  # type: ignore[override]
        return compare(operator.ne, self, other)


def tensor(value: Any) -> Tensor:
    """A constant as Triton types it: int32 where it fits, fp32, int1."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, bool):
        return Tensor(value, real.int1)
    if isinstance(value, int):
        return Tensor(value, real.int32 if -(2**31) <= value < 2**31 else real.int64)
    if isinstance(value, float):
        return Tensor(float(np.float32(value)), real.float32)
    raise fault(f"{type(value).__name__} {value!r} is no number")


def number(value: Any, what: str) -> int:
    """A run-time integer's value: an index, a phase, a coordinate."""
    if isinstance(value, Tensor):
        if value.shape or value.dtype.is_floating():
            raise fault(f"{what} is an integer, given {value.dtype}{value.shape}")
        return int(value.data)
    if not isinstance(value, int):
        raise fault(f"{what} is an integer, given {type(value).__name__}")
    return int(value)


def constant(value: Any, what: str) -> int:
    """A constexpr integer: a size, a count."""
    if isinstance(value, Tensor):
        raise fault(f"{what} must be a constexpr, given a run-time {value.dtype}")
    return operator.index(value)


def rounded(data: Any, dtype: Any) -> Any:
    """fp32 numbers rounded to a floating type."""
    if dtype is real.bfloat16:
        data = widen(narrow(np.asarray(data, np.float32)))
    elif dtype is real.float16:
        data = np.asarray(data).astype(np.float16).astype(np.float32)
    elif dtype is real.float64:
        data = np.asarray(data, np.float64)
    elif not (isinstance(data, np.ndarray) and data.dtype == np.float32):
        data = np.asarray(data).astype(np.float32)
    return _as_number(data)


def in_range(data: Any, dtype: Any, what: str) -> Any:
    """Integers, once it is known that their type holds them."""
    if dtype is real.int1 or dtype is real.int64 or not np.size(data):
        return data
    bits = dtype.primitive_bitwidth
    if not dtype.is_int_signed():
        return data & (2**bits - 1) if bits < 64 else data
    low, high = (data, data) if isinstance(data, int) else (data.min(), data.max())
    if low < -(1 << (bits - 1)) or high >= 1 << (bits - 1):
        raise fault(f"{dtype} overflows in a {what}: {high if high > -low else low}")
    return data


def _as_number(data: Any) -> Any:
    return (
        data.item() if np.ndim(data) == 0 and isinstance(data, (np.ndarray, np.generic)) else data
    )


def block(data: Any, dtype: Any, layout: Layout = None) -> Tensor:
    """A tensor of some values, rounded where its type is a floating one."""
    if dtype.is_floating():
        return Tensor(rounded(data, dtype), dtype, layout)
    kind = np.bool_ if dtype is real.int1 else np.int64
    if isinstance(data, (np.ndarray, np.generic)) and data.dtype != kind:
        data = data.astype(kind)
    return Tensor(_as_number(data), dtype, layout)


def operands(a: Any, b: Any, *, division: bool = False) -> tuple[Any, Any, Any, Layout]:
    """Both operands' values, the type they are computed in, the result's layout."""
    dtype = _common(a, b, division)
    layout = _layout(a, b)
    x, y = (v.data if isinstance(v, Tensor) else v for v in (a, b))
    if dtype.is_floating():
        if dtype.primitive_bitwidth < 32:  # which a constant takes before it is used
            x, y = (v if isinstance(v, np.ndarray) else rounded(float(v), dtype) for v in (x, y))
        return _as_float(x), _as_float(y), dtype, layout
    if dtype is not real.int1:
        return _as_int(x), _as_int(y), dtype, layout
    return x, y, dtype, layout


def _as_float(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return x if x.dtype.kind == "f" else x.astype(np.float32)
    return float(x)


def _as_int(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return x if x.dtype == np.int64 else x.astype(np.int64)
    return int(x)


def _common(a: Any, b: Any, division: bool) -> Any:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        block, other = (a, b) if isinstance(a, Tensor) else (b, a)
        # a constant takes the other's type where that can hold its kind
        if block.dtype.is_floating() or (isinstance(other, bool) and block.dtype is real.int1):
            return real.float32 if division and block.dtype.primitive_bitwidth < 32 else block.dtype
        typed = tensor(other)
        if not typed.dtype.is_floating() and block.dtype is not real.int1:
            return block.dtype if typed.dtype is not real.int64 else real.int64
        return typed.dtype
    x, y = a.dtype, b.dtype
    if x.is_floating() or y.is_floating():
        if not y.is_floating() or not x.is_floating():
            return x if x.is_floating() else y
        if x is y and not (division and x.primitive_bitwidth < 32):
            return x
        wide = x.primitive_bitwidth == 64 or y.primitive_bitwidth == 64
        return real.float64 if wide else real.float32
    if x.primitive_bitwidth != y.primitive_bitwidth:
        return x if x.primitive_bitwidth > y.primitive_bitwidth else y
    return x if not x.is_int_signed() else y


def _layout(a: Any, b: Any) -> Layout:
    x = a.layout if isinstance(a, Tensor) else None
    y = b.layout if isinstance(b, Tensor) else None
    if x is not None and y is not None and x != y:
        raise fault(f"an operation on blocks of different layouts: {x} and {y}")
    return x if x is not None else y


def arithmetic(op: Callable[..., Any], a: Any, b: Any) -> Tensor:
    """Addition, subtraction, multiplication."""
    if not isinstance(b, Tensor) and not isinstance(b, (int, float)):
        return NotImplemented
    if not isinstance(a, Tensor) and not isinstance(a, (int, float)):
        return NotImplemented
    x, y, dtype, layout = operands(a, b)
    if dtype.is_floating():
        return Tensor(rounded(op(x, y), dtype), dtype, layout)
    return Tensor(in_range(op(x, y), dtype, op.__name__), dtype, layout)


def divide(a: Any, b: Any) -> Tensor:
    """a / b, of integers in fp32."""
    x, y, dtype, layout = operands(a, b, division=True)
    if not dtype.is_floating():
        dtype = real.float32
    quotient = np.divide(np.asarray(x, np.float32), np.asarray(y, np.float32))
    return Tensor(rounded(quotient, dtype), dtype, layout)


def integral(op: Callable[..., Any], a: Any, b: Any) -> Tensor:
    """Operations that only integers have."""
    x, y, dtype, layout = operands(a, b)
    if dtype.is_floating():
        raise fault(f"{op.__name__} of {dtype}")
    return Tensor(in_range(op(x, y), dtype, op.__name__), dtype, layout)


def compare(op: Callable[..., Any], a: Any, b: Any) -> Tensor:
    """int1: whether op holds."""
    x, y, _, layout = operands(a, b)
    return Tensor(_as_number(op(x, y)), real.int1, layout)


def truncated_quotient(x: Any, y: Any) -> Any:
    """a // b of run-time integers, which hardware rounds towards zero."""
    if np.any(np.equal(y, 0)):
        raise fault("an integer division by zero")
    quotient = np.abs(x) // np.abs(y) * np.sign(x) * np.sign(y)
    return _as_number(quotient)


def truncated_remainder(x: Any, y: Any) -> Any:
    """a % b of run-time integers, which takes the sign of a on hardware."""
    return _as_number(x - truncated_quotient(x, y) * y)


def expand_dims(x: Tensor, axis: int) -> Tensor:
    """One more axis of size 1."""
    layout = x.layout
    if isinstance(layout, real.SliceLayout):
        if layout.dim != axis % (len(x.shape) + 1):
            raise fault(f"expand_dims({axis}) of a block with {layout}")
        layout = layout.parent
    return Tensor(np.expand_dims(x.data, axis), x.dtype, layout)


def broadcast(x: Any, shape: Sequence[int]) -> np.ndarray:
    """A number's or a block's values in a shape."""
    return np.broadcast_to(x.data if isinstance(x, Tensor) else x, tuple(shape))
