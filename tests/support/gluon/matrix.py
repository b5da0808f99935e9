"""Products on matrix units: asynchronous, in order, read from shared memory as late as they may."""

from __future__ import annotations

from typing import Any

import numpy as np
from triton.experimental.gluon import language as real

from support.gluon.memory import Shared
from support.gluon.races import Access
from support.gluon.schedule import fault, here
from support.gluon.tensors import Tensor, constant
from support.numerics import tf32

_WARPGROUP = 4
_WIDEST = 256
_ONE_THREAD = 2**18  # rows times columns times inner size


class Accumulator:
    """A product in flight, or a block to accumulate to: `warpgroup_mma_wait` opens it."""

    __slots__ = ("dtype", "layout", "ready", "shape")
    __hash__ = object.__hash__

    def __init__(self, shape: list[int], dtype: Any, layout: Any) -> None:
        self.shape, self.dtype, self.layout = shape, dtype, layout
        self.ready: Tensor | None = None


def _unopened(self: Any, *_: Any) -> Any:
    raise fault("an accumulator is read while its product is in flight, or was not waited for")


for _name in ("add", "sub", "mul", "truediv", "lt", "le", "gt", "ge"):
    setattr(Accumulator, f"__{_name}__", _unopened)
    setattr(Accumulator, f"__r{_name}__", _unopened)
for _name in ("__neg__", "__bool__", "__getitem__"):
    setattr(Accumulator, _name, _unopened)
for _name in ("data", "to", "numel"):
    setattr(Accumulator, _name, property(_unopened))


class Product:
    """One warpgroup_mma: its operands, and its accesses to shared memory until it is waited for."""

    def __init__(self, a: Any, b: Shared, acc: Any, use_acc: bool) -> None:
        self.a, self.b, self.acc, self.use_acc = a, b, acc, use_acc
        self.out = Accumulator(list(acc.shape), acc.dtype, acc.layout)
        self.accesses: list[Access] = []
        for operand in (a, b):
            if isinstance(operand, Shared):
                self.accesses.append(operand.begin("product", writes=False, generic=False))
                operand.values("a product")

    def finish(self) -> None:
        """Compute, now that the partition waits for it."""
        data = _product(_values(self.a), _values(self.b))
        if self.use_acc:
            before = self.acc.ready if isinstance(self.acc, Accumulator) else self.acc
            data = data + before.data
        self.out.ready = Tensor(data, self.out.dtype, self.out.layout)
        for access in self.accesses:
            access.finish()


def _product(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # in pieces that OpenBLAS finds too small for threads, which would spin on cores others want
    rows = min(len(x), max(1, _ONE_THREAD // y.size))
    return (x.reshape(-1, rows, x.shape[1]) @ y).reshape(len(x), -1)


def _values(operand: Any) -> np.ndarray:
    data = operand.values("a product") if isinstance(operand, Shared) else operand.data
    data = np.asarray(data, np.float32)
    return tf32(data) if operand.dtype is real.float32 else data


def warpgroup_mma(
    a: Any, b: Shared, acc: Any, *, use_acc: Any = True, precision: Any = None,
    max_num_imprecise_acc: Any = None, is_async: bool = False,
) -> Any:  # fmt: skip
    _check(a, b, acc)
    task = here()
    product = Product(a, b, acc, bool(use_acc))
    task.products.append(product)
    task.program.stats.multiplied(a.shape, b.shape)
    if not is_async:
        return warpgroup_mma_wait(0, deps=[product.out, a])[0]
    task.schedule.step()
    return product.out


def warpgroup_mma_init(value: Tensor) -> Accumulator:
    out = Accumulator(value.shape, value.dtype, value.layout)
    out.ready = value
    return out


def warpgroup_mma_wait(num_outstanding: Any = 0, deps: Any = None) -> Any:
    if deps is None:
        raise fault("warpgroup_mma_wait takes the values that wait in deps")
    task = here()
    allowed = constant(num_outstanding, "a count of products")
    while len(task.products) > allowed:
        product = task.products.pop(0)
        product.finish()
        if isinstance(product.a, Tensor) and not any(_same(product.a, d) for d in deps):
            raise fault(
                "a product's operand in registers may be overwritten before it is read: the wait "
                "that ends the product must have the operand in its deps"
            )
    # what is in flight still may be accumulated to, and no more
    out = [d.ready if isinstance(d, Accumulator) and d.ready is not None else d for d in deps]
    task.schedule.step()
    return out[0] if len(out) == 1 else tuple(out)


def _same(operand: Tensor, kept: Any) -> bool:
    # conversions of layout that move nothing leave the registers what they are
    return isinstance(kept, Tensor) and kept.data is operand.data


def _check(a: Any, b: Any, acc: Any) -> None:
    task = here()
    if task.warps % _WARPGROUP:
        raise fault(f"a product by {task.warps} warps; it takes whole warpgroups of four")
    if not isinstance(b, Shared):
        raise fault("a product's right operand is in shared memory")
    (rows, inner), (inner_b, columns) = a.shape, b.shape
    if inner != inner_b or list(acc.shape) != [rows, columns]:
        raise fault(f"a product of {a.shape} and {b.shape} into {acc.shape}")
    if a.dtype is not b.dtype or acc.dtype is not real.float32:
        raise fault(f"a product of {a.dtype} and {b.dtype} into {acc.dtype}")
    step = 256 // a.dtype.primitive_bitwidth
    if rows % 64 or columns % 8 or inner % step:
        raise fault(f"a product of {a.shape} and {b.shape}: of 64 rows, 8 columns, {step} inner")
    if acc.layout is not None:
        _check_layout(acc.layout, rows, columns, task.warps)
    if isinstance(a, Tensor) and a.layout is not None:
        wanted = real.DotOperandLayout(operand_index=0, parent=acc.layout, k_width=step // 8)
        if acc.layout is not None and a.layout != wanted:
            raise fault(f"a product's left operand in registers of {a.layout}, not {wanted}")


def _check_layout(layout: Any, rows: int, columns: int, warps: int) -> None:
    if not isinstance(layout, real.NVMMADistributedLayout):
        raise fault(f"an accumulator of {layout}")
    width = layout.instr_shape[1]
    if width > _WIDEST or width % 8 or columns % width:
        raise fault(f"an accumulator of {columns} columns in instructions of {width}")
    if int(np.prod(layout.warps_per_cta)) != warps:
        raise fault(f"an accumulator of {layout.warps_per_cta} warps in a partition of {warps}")
