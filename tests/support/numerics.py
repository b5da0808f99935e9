"""Right arithmetic for Triton's interpreter: what hardware computes where the stock one does not.

Triton 3.6 to 3.9 keep a bf16 block as its uint16 bit patterns and hand them to numpy, so bf16
arithmetic, comparisons and tl.dot work on bit patterns; casts to bf16 truncate. Here

    bf16       is widened to fp32 for every operation and rounded to nearest even after it;
    tl.dot     multiplies fp32 as TF32 unless input_precision says otherwise, accumulates in fp32;
    max, min   drop NaN, as max.f32 does;
    fp8        is refused: its saturation is wrong in the interpreter and nothing here needs it.

Not modelled: contraction into fma, approximate division, exp2 and rsqrt, flush to zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter as stock

Handle = stock.TensorHandle
Builder = stock.InterpreterBuilder
COMPARISONS = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}
SMALLEST_DOT = 16  # tensor cores take no shorter inner dimension


class SanitizerError(AssertionError):
    """A kernel did something that hardware forbids, leaves undefined, or does differently."""


def widen(bits: np.ndarray) -> np.ndarray:
    """fp32 values of bf16 bit patterns."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """bf16 bit patterns of fp32 values, to nearest even; NaN stays NaN, overflow is infinity."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = ((bits + half) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).reshape(np.shape(values))


def tf32(values: np.ndarray) -> np.ndarray:
    """fp32 with the ten mantissa bits that a tensor core reads, ties away from zero."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)


def is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def value(handle: Any) -> np.ndarray:
    """What a block holds, bf16 widened to fp32."""
    return widen(handle.data) if is_bf16(handle) else handle.data


def _result(values: np.ndarray, like: Any) -> Any:
    scalar = like.dtype.scalar
    return Handle(narrow(values) if is_bf16(like) else values.astype(like.data.dtype), scalar)


_binary, _unary, _ternary, _cast = (
    Builder.binary_op,
    Builder.unary_op,
    Builder.ternary_op,
    Builder.cast_impl,
)


def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
    with np.errstate(all="ignore"):
        if not is_bf16(left) or isinstance(left.dtype, tl.pointer_type):
            return _binary(self, left, right, op)
        out = op(value(left), value(right))
    return Handle(out if op in COMPARISONS else narrow(out), left.dtype.scalar)


def unary_op(self: Any, arg: Any, op: Any) -> Any:
    with np.errstate(all="ignore"):
        return _result(op(value(arg)), arg) if is_bf16(arg) else _unary(self, arg, op)


def ternary_op(self: Any, a: Any, b: Any, c: Any, op: Any) -> Any:
    if op is np.where or not is_bf16(c):
        return _ternary(self, a, b, c, op)
    return _result(op(value(a), value(b), value(c)), c)


def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    with np.errstate(all="ignore"):
        return _result(value(x).astype(np.float64) * value(y) + value(z), z)


def create_rsqrt(self: Any, arg: Any) -> Any:
    with np.errstate(all="ignore"):
        return _result(1 / np.sqrt(value(arg)), arg)


def create_maxnumf(self: Any, left: Any, right: Any) -> Any:
    return self.binary_op(left, right, np.fmax)


def create_minnumf(self: Any, left: Any, right: Any) -> Any:
    return self.binary_op(left, right, np.fmin)


def get_bf16(self: Any, number: float) -> Any:
    return Handle(narrow(np.array([number], np.float32)), tl.bfloat16)


def cast_impl(self: Any, source: Any, target: Any) -> Any:
    scalar = target.scalar
    for kind in (source.dtype.scalar, scalar):
        if kind.is_floating() and kind.primitive_bitwidth == 8:
            raise SanitizerError(f"cast to or from {kind}: fp8 is not interpreted faithfully")
    with np.errstate(all="ignore"):
        if source.dtype.scalar == tl.bfloat16:
            if scalar == tl.bfloat16:
                return Handle(source.data, scalar)
            return Handle(value(source).astype(stock._get_np_dtype(target)), scalar)
        if scalar == tl.bfloat16:
            return Handle(narrow(source.data.astype(np.float32)), scalar)
        return _cast(self, source, target)


def create_fp_to_fp(self: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
    return cast_impl(self, source, target)


def create_dot(self: Any, a: Any, b: Any, acc: Any, precision: Any, *_: Any) -> Any:
    if a.data.shape[-1] < SMALLEST_DOT:
        raise SanitizerError(
            f"tl.dot over {a.data.shape[-1]} elements; the least is {SMALLEST_DOT}"
        )
    x, y = value(a), value(b)
    if a.dtype.scalar == tl.float32 and precision == ir.INPUT_PRECISION.TF32:
        x, y = tf32(x), tf32(y)
    wide = np.float64 if acc.data.dtype == np.float64 else np.float32
    with np.errstate(all="ignore"):
        out = np.matmul(x.astype(wide), y.astype(wide)) + value(acc)
    return _result(out, acc)


def create_assert(self: Any, condition: Any, message: str) -> None:
    if not np.all(condition.data):
        raise SanitizerError(message)


def refuse_extern(self: Any, library: str, path: str, symbol: str, *_: Any) -> Any:
    raise SanitizerError(
        f"{symbol} comes from libdevice, which the interpreter has not; use tl.math"
    )


def _checked_sum(original: Any) -> Any:
    def reduce(self: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if tensor.handle.dtype.scalar == tl.bfloat16:
            raise SanitizerError("a reduction of bf16 adds in bf16 on hardware; cast to fp32 first")
        with np.errstate(all="ignore"):  # a GPU adds infinities of both signs without a word
            return original(self, tensor, *args, **kwargs)

    return reduce


def install() -> None:
    """Replace the stock interpreter's arithmetic, once for the process."""
    for function in (
        binary_op,
        unary_op,
        ternary_op,
        cast_impl,
        create_fma,
        create_rsqrt,
        create_maxnumf,
        create_minnumf,
        get_bf16,
        create_fp_to_fp,
        create_dot,
        create_assert,
    ):
        setattr(Builder, function.__name__, function)
    Builder.create_extern_elementwise = refuse_extern
    stock.ReduceOps.sum = _checked_sum(stock.ReduceOps.sum)
    stock.ReduceOps.min_max = _checked_sum(stock.ReduceOps.min_max)
