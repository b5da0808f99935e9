"""Shared memory: buffers, views of them, and what the generic proxy reads and writes.

A buffer is bytes; a view is a numpy view of them, so that aliases (index, slice, permute, reshape,
reinterpret) truly alias. Fresh memory is all ones, which is NaN to every float, and reading what
nobody wrote is an error. Swizzles move elements about within a buffer and are not modelled; a read
through a view of another width or dtype than the write's is refused instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from support.gluon.races import Access, Log, Region, region_of
from support.gluon.schedule import fault, here, name_here
from support.gluon.tensors import (
    Tensor,
    constant,
    from_stored,
    number,
    stored_as,
    to_stored,
)

SHARED_BYTES = 232_448  # what one program may have on sm_90
_ALIGNMENT = 128


class Buffer:
    """One allocation of a program's shared memory."""

    def __init__(self, size: int) -> None:
        self.bytes = np.full(size, 0xFF, np.uint8)
        self.written = np.zeros(size, np.uint8)  # in which form each byte was, 0 if never
        self.forms = [""]
        self.log = Log(name_here("shared memory"))
        self.start = self.bytes.__array_interface__["data"][0]
        here().program.buffers.append(self)


class Shared:
    """A view of shared memory, as kernels hold it."""

    def __init__(
        self,
        buffer: Buffer,
        dtype: Any,
        array: np.ndarray,
        written: np.ndarray,
        layout: Any,
        form: int,
    ) -> None:
        self.buffer, self.dtype, self.layout = buffer, dtype, layout
        self.array, self.written = array, written  # bytes of an element innermost
        self.form = form  # which of the buffer's: dtype, width of rows
        self._region: Region | None = None

    @property
    def shape(self) -> list[int]:
        return list(self.array.shape)

    @property
    def rank(self) -> int:
        return self.array.ndim

    @property
    def numel(self) -> int:
        return self.array.size

    @property
    def region(self) -> Region:
        if self._region is None:
            self._region = region_of(self.array)
        return self._region

    @property
    def offset(self) -> int:
        """Bytes from the start of the buffer."""
        return self.region[1] - self.buffer.start

    def _view(self, array: np.ndarray, written: np.ndarray) -> Shared:
        return Shared(self.buffer, self.dtype, array, written, self.layout, self.form)

    def index(self, index: Any) -> Shared:
        at = number(index, "an index into shared memory")
        if not 0 <= at < self.array.shape[0]:
            raise fault(f"index {at} of {self.buffer.log.name}, which has {self.array.shape[0]}")
        return self._view(self.array[at], self.written[at])

    def slice(self, start: Any, length: Any, dim: int = 0) -> Shared:
        begin, size = number(start, "a slice's start"), constant(length, "a slice's length")
        if not 0 <= begin <= begin + size <= self.array.shape[dim]:
            raise fault(f"slice {begin}:{begin + size} of a dimension of {self.array.shape[dim]}")
        at = (slice(None),) * dim + (slice(begin, begin + size),)
        return self._view(self.array[at], self.written[at])

    def permute(self, order: Sequence[int]) -> Shared:
        return self._view(
            self.array.transpose(order), self.written.transpose((*order, self.array.ndim))
        )

    def reshape(self, shape: Sequence[int]) -> Shared:
        sizes = [constant(n, "a shape") for n in shape]
        if prod(sizes) != self.array.size:
            raise fault(f"reshape of {self.shape} to {sizes}")
        array, written = self.array.reshape(sizes), self.written.reshape((*sizes, -1))
        if not np.may_share_memory(array, self.array):
            raise fault(f"reshape of {self.shape} to {sizes} would move elements")
        return self._view(array, written)

    def reinterpret(self, dtype: Any, shape: Sequence[int], layout: Any) -> Shared:
        sizes = [constant(n, "a shape") for n in shape]
        stored = np.dtype(stored_as(dtype))
        size = prod(sizes) * stored.itemsize
        if not self.array.flags.c_contiguous or size > self.array.nbytes:
            raise fault(f"{dtype}{sizes} in place of {self.dtype}{self.shape}, strided or smaller")
        return _of_bytes(self.buffer, self.offset, dtype, sizes, layout)

    _reinterpret = reinterpret

    def _keep_alive(self) -> None:
        return None

    def load(self, layout: Any) -> Tensor:
        """Read by the partition's threads."""
        return Tensor(self.read("load", generic=True), self.dtype, layout)

    def store(self, value: Tensor) -> None:
        """Write by the partition's threads: asynchronous units see it after a fence."""
        if value.dtype is not self.dtype or value.shape != self.shape:
            raise fault(f"a store of {value.dtype}{value.shape} to {self.dtype}{self.shape}")
        access = self.begin("store", writes=True, generic=True)
        self.array[...] = to_stored(np.asarray(value.data), self.dtype)
        self.mark()
        access.finish()
        here().schedule.step()

    def begin(self, what: str, *, writes: bool, generic: bool) -> Access:
        """Note an access that begins now; the caller finishes it."""
        access = Access(what, self.region, writes=writes, generic=generic)
        self.buffer.log.enter(access)
        return access

    def read(self, what: str, *, generic: bool) -> np.ndarray:
        """The values, by a read that is finished at once."""
        access = self.begin(what, writes=False, generic=generic)
        access.finish()
        return self.values(what)

    def values(self, what: str) -> np.ndarray:
        """The values as a register would hold them, however they are ordered."""
        if (self.written != self.form).any():
            found = np.unique(self.written)
            if not found[0]:
                raise fault(f"{what} of memory that was never written, in {self.buffer.log.name}")
            forms = self.buffer.forms
            other = " and ".join(forms[i] for i in found if i != self.form)
            raise fault(f"{what} as {forms[self.form]} of {other}, in {self.buffer.log.name}")
        return from_stored(self.array, self.dtype)

    def mark(self) -> None:
        """Written, or being written, in this view's form."""
        self.written[...] = self.form

    def poison(self) -> None:
        """All ones: what a copy in flight may leave in the meantime."""
        self.array[...] = np.full(self.array.itemsize, 0xFF, np.uint8).view(self.array.dtype)[0]


def _of_bytes(buffer: Buffer, offset: int, dtype: Any, shape: list[int], layout: Any) -> Shared:
    stored = np.dtype(stored_as(dtype))
    size = prod(shape) * stored.itemsize
    array = buffer.bytes[offset : offset + size].view(stored).reshape(shape)
    written = buffer.written[offset : offset + size].reshape((*shape, stored.itemsize))
    form = f"{dtype} in rows of {shape[-1]}"
    if form not in buffer.forms:
        buffer.forms.append(form)
    return Shared(buffer, dtype, array, written, layout, buffer.forms.index(form))


def allocate_shared_memory(
    element_ty: Any, shape: Sequence[int], layout: Any, value: Tensor | None = None
) -> Any:
    """Fresh shared memory, or mbarriers where the layout is theirs."""
    sizes = [constant(n, "a shape") for n in shape]
    if type(layout).__name__ == "MBarrierLayout":
        from support.gluon.barriers import Barriers

        return Barriers(sizes[0])
    inner = sizes[1:] or sizes  # of stages there may be any number
    if any(n < 1 for n in sizes) or any(n & (n - 1) for n in inner):
        raise fault(f"shared memory of shape {sizes}: all but the first are powers of two")
    size = prod(sizes) * np.dtype(stored_as(element_ty)).itemsize
    claim(size, _ALIGNMENT)
    view = _of_bytes(Buffer(size), 0, element_ty, sizes, layout)
    if value is not None:
        view.store(value)
    return view


def claim(size: int, alignment: int) -> None:
    """Take so many bytes of the program's shared memory."""
    task = here()
    if task.program.partitioned:
        raise fault("shared memory is allocated before partitions start")
    program = task.program
    program.shared_bytes = -(-program.shared_bytes // alignment) * alignment + size
    if program.shared_bytes > SHARED_BYTES:
        raise fault(f"{program.shared_bytes} bytes of shared memory; there are {SHARED_BYTES}")


def fence_async_shared(cluster: bool = False) -> None:
    """Show asynchronous units what this partition wrote."""
    task = here()
    for buffer in task.program.buffers:
        buffer.log.fence(task)
    task.schedule.step()


def reinterpret(memory: Shared, dtype: Any, shape: Sequence[int], layout: Any) -> Shared:
    return memory.reinterpret(dtype, shape, layout)
