"""Gluon for Hopper as kernels here use it: one vocabulary from Triton 3.6 to the newest.

Kernels import every Gluon name from this module and none from Triton: names of 3.6 that later
versions refuse are translated here, and tests/support/gluon puts an emulator in this module's
place. Only files that hold Gluon kernels may import it, as it imports Triton.

Copies    a tensor-memory-accelerator copy moves one box of a descriptor; loads report their bytes
          to an mbarrier, stores are waited for by the partition that issued them.
Barriers  an mbarrier has phases: `wait(b, p)` returns once the phase of parity p is complete, so a
          wait for parity 1 on a fresh one returns at once. `sync_warpgroups` and
          `arrive_warpgroups` are PTX's named barriers, of which Triton uses 0 to 7 itself.
Fences    what threads write to shared memory is seen by copies and matrix units after
          `fence_async_shared` and a barrier of the threads that wrote.
"""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

from typing import Any

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = [
    "TensorDescriptor",
    "arrive_warpgroups",
    "box_bytes",
    "constexpr_function",
    "fence_async_shared",
    "gl",
    "jit",
    "mbarrier",
    "mbarriers",
    "partition_barrier",
    "reinterpret",
    "sync_warpgroups",
    "tma_add",
    "tma_load",
    "tma_store",
    "tma_store_wait",
    "warpgroup_mma",
    "warpgroup_mma_init",
    "warpgroup_mma_wait",
]

jit = gluon.jit
constexpr_function = gluon.constexpr_function
_RENAMED = hasattr(tma, "async_load")  # after 3.6; the old names are still there and raise

# (descriptor, coordinates, mbarrier, shared memory, pred=True)
tma_load = tma.async_load if _RENAMED else tma.async_copy_global_to_shared
# (descriptor, coordinates, shared memory)
tma_store = tma.async_store if _RENAMED else tma.async_copy_shared_to_global
# (how many stores may still be reading shared memory)
tma_store_wait = tma.store_wait
# of the warps of one partition
partition_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@builtin
def tma_add(descriptor: Any, coordinates: Any, source: Any, _semantic: Any = None) -> None:
    """Add a box of shared memory to global memory, each element atomically, in no fixed order."""
    at = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    add = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(add, descriptor.handle, at, source.handle)


@builtin
def reinterpret(memory: Any, dtype: Any, shape: Any, layout: Any, _semantic: Any = None) -> Any:
    """The same shared memory as a tensor of another dtype, shape or layout."""
    as_other = memory.reinterpret if hasattr(memory, "reinterpret") else memory._reinterpret
    return as_other(dtype, shape, layout, _semantic=_semantic)


@builtin
def box_bytes(descriptor: Any, _semantic: Any = None) -> Any:
    """Bytes that one copy of a descriptor reports to its mbarrier."""
    return gl.constexpr(descriptor.block_type.nbytes)


@jit
def mbarriers(COUNT: gl.constexpr):
    """COUNT mbarriers; `.index(i)` is one. Each must be initialised before partitions start."""
    return gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())


@jit
def sync_warpgroups(name, THREADS: gl.constexpr):
    """Wait until THREADS threads have come to the named barrier, this partition's among them."""
    if THREADS == 256:
        gl.inline_asm_elementwise(
            "bar.sync $1, 256; mov.b32 $0, 0;", "=r,r", [name], gl.int32, is_pure=False, pack=1
        )
    else:
        gl.static_assert(THREADS == 384)
        gl.inline_asm_elementwise(
            "bar.sync $1, 384; mov.b32 $0, 0;", "=r,r", [name], gl.int32, is_pure=False, pack=1
        )


@jit
def arrive_warpgroups(name, THREADS: gl.constexpr):
    """Come to the named barrier and go on; others wait for THREADS threads there."""
    if THREADS == 256:
        gl.inline_asm_elementwise(
            "bar.arrive $1, 256; mov.b32 $0, 0;", "=r,r", [name], gl.int32, is_pure=False, pack=1
        )
    else:
        gl.static_assert(THREADS == 384)
        gl.inline_asm_elementwise(
            "bar.arrive $1, 384; mov.b32 $0, 0;", "=r,r", [name], gl.int32, is_pure=False, pack=1
        )
