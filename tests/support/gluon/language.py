"""The functions of `gl` on values in registers, and `gl` itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np
from triton.experimental.gluon import language as real

from support.gluon import barriers, global_memory, memory, partitions
from support.gluon.schedule import fault, here
from support.gluon.tensors import (
    Tensor,
    block,
    broadcast,
    constant,
    divide,
    expand_dims,
    operands,
    tensor,
)

_MOST_ELEMENTS = 2**20


def constexpr(value: Any) -> Any:
    """A constant is itself here."""
    return value


def program_id(axis: int) -> Tensor:
    return tensor(here().program.at[constant(axis, "an axis")])


def num_programs(axis: int) -> Tensor:
    return tensor(here().program.grid[constant(axis, "an axis")])


def num_warps() -> int:
    return here().warps


def _sizes(shape: Sequence[Any]) -> list[int]:
    sizes = [constant(n, "a block's size") for n in shape]
    if any(n < 1 or n & (n - 1) for n in sizes) or prod(sizes) > _MOST_ELEMENTS:
        raise fault(f"a block of {sizes}: sizes are powers of two, {_MOST_ELEMENTS} at most in all")
    return sizes


def arange(start: int, end: int, layout: Any = None) -> Tensor:
    first, last = constant(start, "arange's start"), constant(end, "arange's end")
    _sizes([last - first])
    return Tensor(np.arange(first, last), real.int32, layout)


def full(shape: Sequence[int], value: Any, dtype: Any, layout: Any = None) -> Tensor:
    number = tensor(value).to(dtype)
    return block(broadcast(number, _sizes(shape)), dtype, layout)


def zeros(shape: Sequence[int], dtype: Any, layout: Any = None) -> Tensor:
    return full(shape, 0, dtype, layout)


def full_like(
    x: Tensor, value: Any, shape: Any = None, dtype: Any = None, layout: Any = None
) -> Tensor:
    return full(shape or x.shape, value, dtype or x.dtype, layout or x.layout)


def zeros_like(x: Tensor, shape: Any = None, dtype: Any = None, layout: Any = None) -> Tensor:
    return full_like(x, 0, shape, dtype, layout)


def to_tensor(x: Any) -> Tensor:
    return tensor(x)


def cast(x: Any, dtype: Any, **hints: Any) -> Tensor:
    return tensor(x).to(dtype)


def convert_layout(x: Tensor, layout: Any, assert_trivial: bool = False) -> Tensor:
    return Tensor(x.data, x.dtype, layout)


def _elementwise(function: Callable[[Any], Any], *, special: bool = False) -> Callable[..., Tensor]:
    def apply(x: Any) -> Tensor:
        x = tensor(x)
        if not x.dtype.is_floating() or (special and x.dtype.primitive_bitwidth < 32):
            raise fault(f"{function.__name__} of {x.dtype}: it takes fp32")
        if special:
            here().program.stats.transcendentals += x.numel
        return block(function(np.asarray(x.data, np.float32)), x.dtype, x.layout)

    return apply


def _rsqrt(x: np.ndarray) -> np.ndarray:
    return np.float32(1) / np.sqrt(x)


def absolute(x: Any) -> Tensor:
    x = tensor(x)
    return Tensor(np.abs(x.data), x.dtype, x.layout)


def fma(x: Any, y: Any, z: Any) -> Tensor:
    """x * y + z in one rounding."""
    like = x * y + z
    a, b, c = (np.asarray(tensor(v).data, np.float64) for v in (x, y, z))
    return block(a * b + c, like.dtype, like.layout)


def fdiv(x: Any, y: Any, ieee_rounding: bool = False) -> Tensor:
    return divide(x, y)


def _chooser(op: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    def apply(x: Any, y: Any, propagate_nan: Any = None) -> Any:
        if not isinstance(x, Tensor) and not isinstance(y, Tensor):
            return plain(x, y)
        a, b, dtype, layout = operands(x, y)
        return block(op(a, b), dtype, layout)

    return apply


def clamp(x: Any, low: Any, high: Any) -> Tensor:
    return FUNCTIONS["minimum"](FUNCTIONS["maximum"](x, low), high)


def where(condition: Any, x: Any, y: Any) -> Tensor:
    if not isinstance(x, Tensor) and not isinstance(y, Tensor):
        x = tensor(x)
    a, b, dtype, layout = operands(x, y)
    condition = tensor(condition)
    if condition.dtype is not real.int1:
        raise fault(f"where of a condition of {condition.dtype}: it takes int1")
    if condition.layout is not None and layout is not None and condition.layout != layout:
        raise fault(f"where of different layouts: {condition.layout} and {layout}")
    layout = layout if layout is not None else condition.layout
    return block(np.where(condition.data, a, b), dtype, layout)


def expanded(x: Tensor, axis: int) -> Tensor:
    return expand_dims(x, constant(axis, "an axis"))


def _listed(sizes: tuple[Any, ...]) -> Sequence[Any]:
    return sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (list, tuple)) else sizes


def reshape(x: Tensor, *shape: Any) -> Tensor:
    return Tensor(x.data.reshape(_sizes(_listed(shape))), x.dtype)


def permute(x: Tensor, *order: Any) -> Tensor:
    return Tensor(x.data.transpose(_listed(order)), x.dtype)


def join(x: Tensor, y: Tensor) -> Tensor:
    return Tensor(np.stack([x.data, y.data], -1), x.dtype)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    return Tensor(x.data[..., 0], x.dtype), Tensor(x.data[..., 1], x.dtype)


def _reduction(function: Callable[..., Any]) -> Callable[..., Tensor]:
    def apply(x: Tensor, axis: Any = None, **hints: Any) -> Tensor:
        layout = None
        if axis is not None and x.layout is not None and len(x.shape) > 1:
            layout = real.SliceLayout(axis, x.layout)
        return block(function(x.data, axis=axis), x.dtype, layout)

    return apply


def static_assert(condition: Any, message: str = "") -> None:
    if isinstance(condition, Tensor):
        raise fault("static_assert of what is known only at run time")
    if not condition:
        raise fault(f"static_assert: {message}")


def device_assert(condition: Any, message: str = "", **hints: Any) -> None:
    if not np.all(tensor(condition).data):
        raise fault(f"device_assert: {message}")


def assume(condition: Any) -> None:
    if not tensor(condition):
        raise fault("assume of what does not hold")


def multiple_of(x: Any, values: Any) -> Any:
    step = values[0] if isinstance(values, (list, tuple)) else values
    if np.ravel(tensor(x).data)[0] % step:
        raise fault(f"multiple_of {step} of {tensor(x).data}")
    return x


def max_contiguous(x: Any, values: Any) -> Any:
    return x


def cdiv(x: Any, y: Any) -> Any:
    """x / y rounded up, where x is not negative."""
    return (x + (y - 1)) // y


def inline_asm_elementwise(asm: str, *rest: Any, **hints: Any) -> Any:
    raise fault(f"inline assembly is not emulated: {asm!r}; wrap it in swathe.kernels.core.gluon")


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": absolute,
    "allocate_shared_memory": memory.allocate_shared_memory,
    "arange": arange,
    "assume": assume,
    "atomic_add": global_memory.atomic_add,
    "cast": cast,
    "cdiv": cdiv,
    "ceil": _elementwise(np.ceil),
    "clamp": clamp,
    "constexpr": constexpr,
    "convert_layout": convert_layout,
    "cos": _elementwise(np.cos, special=True),
    "device_assert": device_assert,
    "div_rn": fdiv,
    "exp": _elementwise(np.exp, special=True),
    "exp2": _elementwise(np.exp2, special=True),
    "expand_dims": expanded,
    "fdiv": fdiv,
    "floor": _elementwise(np.floor),
    "fma": fma,
    "full": full,
    "full_like": full_like,
    "inline_asm_elementwise": inline_asm_elementwise,
    "join": join,
    "load": global_memory.load,
    "log": _elementwise(np.log, special=True),
    "log2": _elementwise(np.log2, special=True),
    "max": _reduction(np.fmax.reduce),
    "max_contiguous": max_contiguous,
    "maximum": _chooser(np.fmax, max),
    "min": _reduction(np.fmin.reduce),
    "minimum": _chooser(np.fmin, min),
    "multiple_of": multiple_of,
    "num_programs": num_programs,
    "num_warps": num_warps,
    "permute": permute,
    "pointer_type": real.pointer_type,
    "program_id": program_id,
    "reshape": reshape,
    "rsqrt": _elementwise(_rsqrt, special=True),
    "sin": _elementwise(np.sin, special=True),
    "split": split,
    "sqrt": _elementwise(np.sqrt, special=True),
    "static_assert": static_assert,
    "static_range": range,
    "store": global_memory.store,
    "sum": _reduction(np.sum),
    "thread_barrier": barriers.partition_barrier,
    "to_tensor": to_tensor,
    "warp_specialize": partitions.warp_specialize,
    "where": where,
    "zeros": zeros,
    "zeros_like": zeros_like,
}


class _Language(SimpleNamespace):
    def __getattr__(self, name: str) -> Any:
        raise fault(f"gl.{name} is not emulated: add it to support.gluon.language")


def language() -> SimpleNamespace:
    """What kernels know as `gl`: the functions here, Triton's own types and layouts."""
    names: dict[str, Any] = dict(FUNCTIONS)
    for name in dir(real):
        value = getattr(real, name)
        if isinstance(value, real.dtype) or (isinstance(value, type) and "Layout" in name):
            names[name] = value
    return _Language(**names)
