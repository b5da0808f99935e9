"""Global memory: tensor arguments, pointers into them, loads, stores and atomics.

Every address must lie in a tensor argument. Two partitions or programs that touch one address, one
of them writing, must be ordered by barriers or atomics; additions by copies may meet each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from triton.experimental.gluon import language as real

from support.gluon.schedule import Clock, fault, here, join
from support.gluon.tensors import (
    Tensor,
    block,
    broadcast,
    from_stored,
    number,
    stored_as,
    tensor,
    to_stored,
)

_DTYPES = {
    torch.float32: real.float32,
    torch.float16: real.float16,
    torch.bfloat16: real.bfloat16,
    torch.float64: real.float64,
    torch.int8: real.int8,
    torch.uint8: real.uint8,
    torch.int16: real.int16,
    torch.int32: real.int32,
    torch.int64: real.int64,
    torch.bool: real.int1,
}
_SEVERAL = -1  # as the last reader of an address: more than one task
ADDED = -2  # as its last writer: additions by copies, which meet in any order
ATOMIC = -3  # or atomics
STORED = -4  # or a copy out, which nobody sees before the kernel ends
_NEVER = 2**31 - 1  # a time that no clock reaches


def dtype_of(t: torch.Tensor) -> Any:
    """Triton's name of a tensor's dtype."""
    if t.dtype not in _DTYPES:
        raise fault(f"a tensor argument of {t.dtype}")
    return _DTYPES[t.dtype]


class Storage:
    """The memory behind tensor arguments: which elements are theirs, who touched each."""

    def __init__(self, t: torch.Tensor) -> None:
        flat = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())  # type: ignore[call-overload]
        self.dtype = dtype_of(t)
        stored = np.dtype(stored_as(self.dtype))
        self.array = flat.numpy()[: flat.numel() // stored.itemsize * stored.itemsize].view(stored)
        self.ours = np.zeros(self.array.shape, np.bool_)
        self.writer, self.wrote = self._blank(), self._blank()
        self.reader, self.read = self._blank(), self._blank()
        self.synchronised: dict[int, Clock] = {}  # by atomics, at each address

    def _blank(self) -> np.ndarray:
        return np.zeros(self.array.shape, np.int32)

    def add(self, t: torch.Tensor) -> None:
        """Count a tensor's elements among those that kernels may touch."""
        strides = [s * self.ours.itemsize for s in t.stride()]
        start = self.ours[t.storage_offset() :]
        np.lib.stride_tricks.as_strided(start, tuple(t.shape), strides)[...] = True


class Picked:
    """Some elements of a storage: by their indices, or as a strided window."""

    def __init__(self, storage: Storage, at: np.ndarray | None, window: Any = None) -> None:
        self.storage, self.at, self.window = storage, at, window

    def get(self, array: np.ndarray) -> np.ndarray:
        if self.at is not None:
            return array[self.at]
        offset, shape, strides = self.window
        steps = [s * array.itemsize for s in strides]
        return np.lib.stride_tricks.as_strided(array[offset:], shape, steps)

    def put(self, array: np.ndarray, value: Any) -> None:
        if self.at is not None:
            array[self.at] = value
        else:
            self.get(array)[...] = value

    def touch_to_read(self, what: str) -> None:
        """Check a read against writes that are not in the running partition's past; note it."""
        task, storage = here(), self.storage
        self._ordered(storage.writer, storage.wrote, what)
        reader = self.get(storage.reader)
        alone = (reader == 0) | (reader == task.number)
        self.put(storage.reader, np.where(alone, task.number, _SEVERAL))
        self.put(storage.read, task.clock[task.number])

    def touch_to_write(self, what: str, kind: int | None = None, *, meets: bool = False) -> None:
        """Check a write against reads and other writes; note it.

        `kind` is ADDED, ATOMIC or STORED where it is no plain store; `meets` lets it meet its kind.
        """
        task, storage = here(), self.storage
        self._ordered(storage.writer, storage.wrote, what, kind if meets else None)
        if kind != ATOMIC:
            self._ordered(storage.reader, storage.read, what)
        self.put(storage.writer, task.number if kind is None else kind)
        self.put(storage.wrote, task.clock[task.number] if kind is None else _NEVER)

    def _ordered(
        self, actors: np.ndarray, times: np.ndarray, what: str, kind: int | None = None
    ) -> None:
        actor, time, clock = self.get(actors), self.get(times), here().clock
        for one in np.unique(actor):
            if one == 0 or one == kind:
                continue
            late = (actor == one) & (time > clock.get(int(one), 0))
            if late.any():
                does = "reads" if actors is self.storage.reader else "writes"
                raise fault(
                    f"race in global memory: {what} of {int(late.sum())} elements that another "
                    f"partition or program {does}, with nothing to order the two"
                )


class Pointer:
    """Addresses of elements of one storage."""

    __slots__ = ("at", "layout", "storage")

    def __init__(self, storage: Storage, at: Any, layout: Any = None) -> None:
        self.storage, self.at, self.layout = storage, at, layout

    @property
    def dtype(self) -> Any:
        return real.pointer_type(self.storage.dtype)

    @property
    def shape(self) -> list[int]:
        return list(np.shape(self.at))

    def __add__(self, offset: Any) -> Pointer:
        moved = tensor(offset)
        if moved.dtype.is_floating():
            raise fault(f"a pointer plus {moved.dtype}")
        layout = self.layout if self.layout is not None else moved.layout
        return Pointer(self.storage, self.at + moved.data, layout)

    __radd__ = __add__

    def __sub__(self, offset: Any) -> Pointer:
        return self + (tensor(offset) * -1)

    def pick(self, what: str, mask: Any) -> tuple[Picked, np.ndarray | None, tuple[int, ...]]:
        """The elements that live lanes touch, which lanes live, and the access's shape."""
        shape = np.shape(self.at)
        at = np.asarray(self.at)
        live = None
        if mask is not None:
            shape = np.broadcast_shapes(shape, np.shape(tensor(mask).data))
            live = broadcast(tensor(mask), shape)
            at = np.broadcast_to(at, shape)[live]
        at = at.reshape(-1)
        ours = self.storage.ours
        bad = (at < 0) | (at >= ours.size)
        if not bad.any():
            bad = ~ours[at]
        if bad.any():
            raise fault(
                f"out of bounds: {what} of {int(bad.sum())} elements outside the tensor arguments, "
                f"the first at element {int(at[bad][0])}"
            )
        return Picked(self.storage, at), live, shape


def _undefined(dtype: Any) -> Any:
    return float("nan") if dtype.is_floating() else (True if dtype is real.int1 else -0x55555556)


def load(pointer: Pointer, mask: Any = None, other: Any = None, **hints: Any) -> Tensor:
    """Lanes that the mask leaves out give `other`, and without it something useless."""
    picked, live, shape = pointer.pick("load", mask)
    dtype = pointer.storage.dtype
    picked.touch_to_read("load")
    values = from_stored(picked.get(pointer.storage.array), dtype)
    if live is None:
        data = values.reshape(shape)
    else:
        rest = _undefined(dtype) if other is None else tensor(other).to(dtype)
        data = np.array(broadcast(rest, shape), values.dtype)
        data[live] = values
    return block(data, dtype, pointer.layout)


def store(pointer: Pointer, value: Any, mask: Any = None, **hints: Any) -> None:
    picked, live, shape = pointer.pick("store", mask)
    storage = pointer.storage
    if picked.at is not None and np.unique(picked.at).size != picked.at.size:
        raise fault("one store writes an address twice")
    data = broadcast(tensor(value).to(storage.dtype), shape)
    stored = to_stored((data if live is None else data[live]).reshape(-1), storage.dtype)
    picked.touch_to_write("store")
    picked.put(storage.array, stored)
    here().schedule.step()


def atomic_add(
    pointer: Pointer, value: Any, mask: Any = None, sem: str = "acq_rel", scope: str = "gpu"
) -> Tensor:
    """The value before. Unless relaxed, it orders this partition after those who came before."""
    if pointer.shape:
        raise fault("atomic_add of a block is not emulated: one address at a time")
    storage, task = pointer.storage, here()
    if mask is not None and not tensor(mask):
        return Tensor(_undefined(storage.dtype), storage.dtype)
    picked, _, _ = pointer.pick("atomic_add", None)
    past = storage.synchronised.setdefault(number(pointer.at, "an address"), {})
    if sem != "relaxed":
        task.acquire(past)
    old = block(from_stored(picked.get(storage.array), storage.dtype).reshape(()), storage.dtype)
    picked.touch_to_write("atomic_add", ATOMIC, meets=True)
    picked.put(storage.array, to_stored(np.asarray((old + value).data), storage.dtype))
    if sem != "relaxed":
        join(past, task.release())
    task.schedule.step()
    return old


class Window:
    """A box of a tensor: what of it lies inside, and where in the box that goes."""

    def __init__(
        self, storage: Storage, offset: int, sizes: Sequence[int], strides: Sequence[int],
        box: Sequence[int], corner: Sequence[int],
    ) -> None:  # fmt: skip
        low = [max(0, -c) for c in corner]
        high = [min(b, n - c) for b, n, c in zip(box, sizes, corner, strict=True)]
        self.inside = all(a < b for a, b in zip(low, high, strict=True))
        self.part = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        start = offset + sum((c + a) * s for c, a, s in zip(corner, low, strides, strict=True))
        shape = tuple(b - a for a, b in zip(low, high, strict=True))
        self.picked = Picked(storage, None, (start, shape, strides))
