"""The functions of `gl` on blocks in registers, and what of it starts partitions."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np
from triton.experimental.gluon import language as real

from support.gluon import barriers, global_memory, memory
from support.gluon.schedule import Task, fault, here
from support.gluon.tensors import (
    Tensor,
    arithmetic,
    compare,
    constant,
    divide,
    expand_dims,
    integral,
    rounded,
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
    kind = np.float32 if dtype.is_floating() else np.bool_ if dtype is real.int1 else np.int64
    return Tensor(np.full(_sizes(shape), number.data, kind), dtype, layout)


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


def _unary(function: Callable[[Any], Any], special: bool = False) -> Callable[[Any], Tensor]:
    def apply(x: Any) -> Tensor:
        x = tensor(x)
        if not x.dtype.is_floating():
            raise fault(f"{function.__name__} of {x.dtype}")
        if special and x.dtype.primitive_bitwidth < 32:
            raise fault(f"{function.__name__} of {x.dtype}: widen it to fp32")
        if special:
            here().program.stats.transcendentals += x.numel
        return Tensor(rounded(function(np.asarray(x.data, np.float32)), x.dtype), x.dtype, x.layout)

    return apply


exp, exp2 = _unary(np.exp, True), _unary(np.exp2, True)
log, log2 = _unary(np.log, True), _unary(np.log2, True)
sqrt, floor, ceil = _unary(np.sqrt, True), _unary(np.floor), _unary(np.ceil)
sin, cos = _unary(np.sin, True), _unary(np.cos, True)


def _reciprocal_root(x: Any) -> Any:
    return np.float32(1) / np.sqrt(x)


rsqrt = _unary(_reciprocal_root, True)


def abs(x: Any) -> Tensor:
    x = tensor(x)
    return Tensor(np.abs(x.data), x.dtype, x.layout)


def fma(x: Any, y: Any, z: Any) -> Tensor:
    """x * y + z in one rounding."""
    like = x * y + z
    parts = [np.asarray(tensor(v).data, np.float64) for v in (x, y, z)]
    return Tensor(rounded(parts[0] * parts[1] + parts[2], like.dtype), like.dtype, like.layout)


def fdiv(x: Any, y: Any, ieee_rounding: bool = False) -> Tensor:
    return divide(x, y)


div_rn = fdiv


def _least_or_most(op: Callable[..., Any]) -> Callable[..., Tensor]:
    def apply(x: Any, y: Any, propagate_nan: Any = None) -> Any:
        if not isinstance(x, Tensor) and not isinstance(y, Tensor):
            return (max if op is np.fmax else min)(x, y)
        return select(op, x, y)

    return apply


def select(op: Callable[..., Any], x: Any, y: Any) -> Tensor:
    """fmax or fmin, which drop NaN as hardware does."""
    either = where(compare(operator.le, x, x), x, y)  # types and layouts only
    data = op(tensor(x).data, tensor(y).data)
    return Tensor(
        data.item() if np.ndim(data) == 0 else data.astype(_kind(either)),
        either.dtype,
        either.layout,
    )


def _kind(x: Tensor) -> Any:
    return np.asarray(x.data).dtype


maximum, minimum = _least_or_most(np.fmax), _least_or_most(np.fmin)


def clamp(x: Any, low: Any, high: Any) -> Tensor:
    return minimum(maximum(x, low), high)


def where(condition: Any, x: Any, y: Any) -> Tensor:
    if not isinstance(x, Tensor) and not isinstance(y, Tensor):
        x = tensor(x)
    like = _pair(x, y)
    condition = tensor(condition)
    if condition.layout is not None and like.layout is not None and condition.layout != like.layout:
        raise fault(f"where of different layouts: {condition.layout} and {like.layout}")
    data = np.where(condition.data, tensor(x).data, tensor(y).data)
    layout = like.layout if like.layout is not None else condition.layout
    if np.ndim(data) == 0:
        return Tensor(data.item(), like.dtype, layout).to(like.dtype)
    kind = (
        np.float32
        if like.dtype.is_floating()
        else np.bool_
        if like.dtype is real.int1
        else np.int64
    )
    return Tensor(
        rounded(data, like.dtype) if like.dtype.is_floating() else data.astype(kind),
        like.dtype,
        layout,
    )


def expand(x: Tensor, axis: int) -> Tensor:
    return expand_dims(x, constant(axis, "an axis"))


def reshape(x: Tensor, *shape: Any) -> Tensor:
    sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], (list, tuple)) else shape
    return Tensor(x.data.reshape(_sizes(sizes)), x.dtype)


def permute(x: Tensor, *order: Any) -> Tensor:
    axes = order[0] if len(order) == 1 and isinstance(order[0], (list, tuple)) else order
    return Tensor(x.data.transpose(axes), x.dtype)


def join(x: Tensor, y: Tensor) -> Tensor:
    return Tensor(np.stack([x.data, y.data], -1), x.dtype)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    return Tensor(x.data[..., 0], x.dtype), Tensor(x.data[..., 1], x.dtype)


def _reduction(function: Callable[..., Any]) -> Callable[..., Tensor]:
    def apply(x: Tensor, axis: Any = None, **hints: Any) -> Tensor:
        data = function(x.data, axis=axis)
        layout = None
        if axis is not None and x.layout is not None and len(x.shape) > 1:
            layout = real.SliceLayout(axis, x.layout)
        if np.ndim(data) == 0:
            data = data.item()
        return Tensor(rounded(data, x.dtype) if x.dtype.is_floating() else data, x.dtype, layout)

    return apply


max, min, sum = _reduction(np.fmax.reduce), _reduction(np.fmin.reduce), _reduction(np.sum)


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
    return (x + (y - 1)) // y


def static_print(*values: Any, **hints: Any) -> None:
    return None


def inline_asm_elementwise(asm: str, *rest: Any, **hints: Any) -> Any:
    raise fault(f"inline assembly is not emulated: {asm!r}; wrap it in swathe.kernels.core.gluon")


def warp_specialize(
    functions_and_args: Sequence[tuple[Any, Sequence[Any]]],
    worker_num_warps: Sequence[int],
    worker_num_regs: Sequence[int] | None = None,
) -> Any:
    """Run the first function here and the others each in a partition of its own, until all end."""
    task = here()
    program, schedule = task.program, task.schedule
    (first, first_args), *others = functions_and_args
    if program.partitioned:
        raise fault("warp_specialize inside a partition")
    if len(others) != len(worker_num_warps):
        raise fault(f"{len(others)} workers and {len(worker_num_warps)} counts of warps")
    for count in worker_num_regs or ():
        if constant(count, "a count of registers") % 8 or not 24 <= count <= 256:
            raise fault(f"{count} registers: a multiple of 8 from 24 to 256")
    program.partitioned = True
    name, task.name = task.name, first.__name__
    workers = []
    for (function, args), warps in zip(others, worker_num_warps, strict=True):
        worker = Task(schedule, program, function.__name__, constant(warps, "a count of warps"))
        worker.acquire(task.release())
        workers.append(worker)
        schedule.start(worker, lambda f=function, a=args: program.partition(f, a))
    result = program.partition(first, first_args)
    schedule.wait(
        lambda: not any(w in schedule.tasks for w in workers),
        lambda: f"{', '.join(w.name for w in workers if not w.done)} to end",
    )
    for worker in workers:
        task.acquire(worker.clock)
    task.name = name
    program.partitioned = False
    return result


def _pair(x: Any, y: Any) -> Tensor:
    """A number of the type and layout that an operation on both would have."""
    first = (
        Tensor(0 if not x.dtype.is_floating() else 0.0, x.dtype, x.layout)
        if isinstance(x, Tensor)
        else x
    )
    second = (
        Tensor(0 if not y.dtype.is_floating() else 0.0, y.dtype, y.layout)
        if isinstance(y, Tensor)
        else y
    )
    if (
        isinstance(x, Tensor)
        and x.dtype is real.int1
        and (isinstance(y, bool) or getattr(y, "dtype", None) is real.int1)
    ):
        return integral(operator.or_, first, second)
    return arithmetic(operator.add, first, second)


def namespace() -> SimpleNamespace:
    """What kernels know as `gl`: this module's functions, Triton's own types and layouts."""
    names = {name: value for name, value in globals().items() if not name.startswith("_")}
    for name in dir(real):
        value = getattr(real, name)
        if isinstance(value, real.dtype) or (isinstance(value, type) and "Layout" in name):
            names[name] = value
    names.update(
        expand_dims=expand, static_range=range, range=range,
        load=global_memory.load, store=global_memory.store, atomic_add=global_memory.atomic_add,
        allocate_shared_memory=memory.allocate_shared_memory, pointer_type=real.pointer_type,
        barrier=barriers.partition_barrier, thread_barrier=barriers.partition_barrier,
        tensor=Tensor, tuple=tuple,
    )  # fmt: skip
    return SimpleNamespace(**names)
