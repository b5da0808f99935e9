"""Copies by the tensor memory accelerator: late, in boxes, clipped at the tensor's ends.

A load leaves its destination poisoned until it is complete, and reports its bytes to an mbarrier. A
store or an addition reads shared memory at any time until its partition has waited for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from triton.experimental.gluon import language as real

from support.gluon.barriers import Barriers, one
from support.gluon.global_memory import ADDED, STORED, Storage, Window, dtype_of
from support.gluon.memory import Shared
from support.gluon.schedule import EmulationError, fault, here
from support.gluon.tensors import constant, from_stored, number, to_stored

_LONGEST_BOX = 256


class Descriptor:
    """A tensor and the box that one copy moves, as kernels hold them."""

    def __init__(self, host: Any, storage: Storage) -> None:
        self.dtype = dtype_of(host.base)
        self.layout, self.padding = host.layout, host.padding
        self.block_shape = [int(n) for n in host.block_shape]
        self.block_type = real.block_type(self.dtype, self.block_shape)
        self.sizes, self.strides = [int(n) for n in host.shape], [int(n) for n in host.strides]
        self.storage, self.offset = storage, host.base.storage_offset()
        item = host.base.element_size()
        reach = sum((n - 1) * s for n, s in zip(self.sizes, self.strides, strict=True))
        if self.offset + reach >= storage.array.size:
            raise EmulationError(f"a descriptor of {self.sizes} reaches past its tensor's memory")
        if any(n > _LONGEST_BOX for n in self.block_shape[:-1]):
            raise EmulationError(f"a box of {self.block_shape}: a side has at most 256 elements")
        if self.block_shape[-1] * item % 16:
            raise EmulationError(
                f"a box of {self.block_shape}: its rows are no multiple of 16 bytes"
            )
        if any(s * item % 16 for s in self.strides[:-1]) or host.base.data_ptr() % 16:
            raise EmulationError(
                f"strides {self.strides} or the address are no multiple of 16 bytes"
            )
        self.nbytes = item * int(np.prod(self.block_shape))

    @property
    def shape(self) -> list[int]:
        return self.sizes

    def window(self, coordinates: Sequence[Any]) -> Window:
        """The box at some coordinates."""
        corner = [number(c, "a coordinate") for c in coordinates]
        if len(corner) != len(self.sizes):
            raise fault(f"{len(corner)} coordinates of a descriptor of rank {len(self.sizes)}")
        return Window(self.storage, self.offset, self.sizes, self.strides, self.block_shape, corner)

    def check(self, memory: Shared) -> None:
        """That a copy between its tensor and a view of shared memory is one that exists."""
        if memory.shape != self.block_shape or memory.dtype is not self.dtype:
            raise fault(
                f"a copy of {self.dtype}{self.block_shape} and {memory.dtype}{memory.shape}"
            )
        if not memory.region[3]:
            raise fault("a copy to or from a strided view of shared memory")
        if memory.layout != self.layout:
            raise fault(f"a copy between {self.layout} and shared memory of {memory.layout}")
        atom = 8 * self.layout.swizzle_byte_width or 128
        if memory.offset % max(atom, 128):
            raise fault(f"a copy at byte {memory.offset} of its buffer: no multiple of {atom}")


def tma_load(
    descriptor: Descriptor, coordinates: Any, barrier: Barriers, memory: Shared, pred: Any = True
) -> None:
    if not pred:
        return
    descriptor.check(memory)
    bar, task = one(barrier), here()
    bar.check()
    window = descriptor.window(coordinates)
    if window.inside:
        window.picked.touch_to_read("a copy in")
    access = memory.begin("copy in", writes=True, generic=False)
    task.program.loads.append(access)
    past = dict(task.clock)
    memory.poison()
    memory.mark()
    bar.copies.append(access)
    task.program.stats.loaded(descriptor, window)

    def complete() -> None:
        data = np.zeros(memory.array.shape, np.float32)
        if descriptor.padding == "nan":
            data[...] = np.nan
        if window.inside:
            stored = window.picked.get(descriptor.storage.array)
            data = data if descriptor.dtype.is_floating() else data.astype(np.int64)
            data[window.part] = from_stored(stored, descriptor.dtype)
        memory.array[...] = to_stored(data, descriptor.dtype)
        access.finish_at(bar.actor, bar.completed + 1)
        bar.complete(access, descriptor.nbytes, past)

    task.schedule.later(complete)
    task.schedule.step()


class Outgoing:
    """A store or an addition in flight."""

    def __init__(self, descriptor: Descriptor, window: Window, memory: Shared, adds: bool) -> None:
        self.access = memory.begin("copy out", writes=False, generic=False)
        self.descriptor, self.window, self.memory, self.adds = descriptor, window, memory, adds
        self.values = memory.values("copy out")
        self.landed = False

    def land(self) -> None:
        if self.landed:
            return
        self.landed = True
        if not self.window.inside:
            return
        storage, picked = self.descriptor.storage, self.window.picked
        values = from_stored(self.memory.array, self.descriptor.dtype)[self.window.part]
        if self.adds:
            values = values + from_stored(picked.get(storage.array), self.descriptor.dtype)
        picked.put(storage.array, to_stored(values, self.descriptor.dtype))


def _send(descriptor: Descriptor, coordinates: Any, memory: Shared, adds: bool) -> None:
    descriptor.check(memory)
    task, window = here(), descriptor.window(coordinates)
    outgoing = Outgoing(descriptor, window, memory, adds)
    if window.inside:
        window.picked.touch_to_write("a copy out", ADDED if adds else STORED, meets=adds)
    task.stores.append(outgoing)
    task.program.stats.stored(descriptor, window)
    task.schedule.later(outgoing.land)
    task.schedule.step()


def tma_store(descriptor: Descriptor, coordinates: Any, memory: Shared) -> None:
    _send(descriptor, coordinates, memory, False)


def tma_add(descriptor: Descriptor, coordinates: Any, memory: Shared) -> None:
    _send(descriptor, coordinates, memory, True)


def tma_store_wait(pendings: Any) -> None:
    task, allowed = here(), constant(pendings, "a count of stores")
    while len(task.stores) > allowed:
        outgoing = task.stores.pop(0)
        outgoing.land()
        outgoing.access.finish()
    task.schedule.step()


def box_bytes(descriptor: Descriptor) -> int:
    return descriptor.nbytes
