"""Pieces of attention's backward for Hopper: weights and slopes, numbers of rows, stores."""

# pyright: reportArgumentType=false
# mypy: disable-error-code="assignment"

from __future__ import annotations

from typing import Any, NamedTuple

from swathe.kernels.attention._gluon_tiles import accumulator, slot_of, tile_of
from swathe.kernels.core.gluon import (
    box_bytes,
    fence_async_shared,
    gl,
    jit,
    mbarrier,
    mbarriers,
    partition_barrier,
    tma_load,
    tma_store,
    warpgroup_mma_wait,
)

ROWS = gl.constexpr(128)  # of a program for dq
ROUND = gl.constexpr(128)  # rows of `stats` and `seen` are rounded up to this
LANES = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))  # of a program before it parts
PLAIN = ["T", "S", "H", "groups", "shift", "scale", "softcap"]


class Rows(NamedTuple):
    """Stages of four numbers a row: lse2, delta, first and last.

    A slot is empty when q's is: nobody reads it later.
    """

    stats: Any
    seen: Any
    full: Any


@jit
def anew(INDEX: gl.constexpr, step):
    """INDEX, though the compiler cannot know it.

    Addresses of operands that stay where they are through a loop are else all found before it, and
    take the registers of the sums.
    """
    return INDEX + (step >> 30)


@jit
def weights(z, factor, lse, t, SOFTCAP: gl.constexpr):
    """p, and what dp - delta is multiplied by to be ds: p times the softcap's derivative."""
    p = gl.exp2(z * factor - lse)
    slope = p
    if SOFTCAP:
        slope = p * (1.0 - t * t)
    return p, slope


@jit
def times(acc, by):
    """Every piece times one number."""
    pieces = ()
    for i in gl.static_range(len(acc)):
        pieces = pieces + (acc[i] * by,)
    return pieces


@jit
def store(to, memory, slot, value, b, h, row):
    """Begin to store a warpgroup's rows, piece by piece, by way of shared memory that is free."""
    for i in gl.static_range(len(memory)):
        tile_of(memory[i], slot).store(value[i].to(to[i].dtype))
    fence_async_shared()
    partition_barrier()
    tma_store(to[0], [b, h, row, 0], memory[0].index(slot))
    if len(memory) == 2:
        tma_store(to[1], [b, h, row, to[0].block_shape[3]], memory[1].index(slot))


@jit
def done(acc, p, PENDING: gl.constexpr):
    """Sums whose products by p are done; PENDING later groups of products may be under way."""
    if len(acc) == 1:
        first, p = warpgroup_mma_wait(PENDING, deps=[acc[0], p])
        return (first,)
    else:
        first, second, p = warpgroup_mma_wait(PENDING, deps=[acc[0], acc[1], p])
        return first, second


@jit
def rows_for(stats_at, seen_at, BLOCK_T: gl.constexpr, STAGES: gl.constexpr):
    """Room for the numbers of rows."""
    full = mbarriers(STAGES)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    return Rows(
        gl.allocate_shared_memory(gl.float32, [2 * STAGES, 1, BLOCK_T], stats_at.layout),
        gl.allocate_shared_memory(gl.int32, [2 * STAGES, 1, BLOCK_T], seen_at.layout),
        full,
    )


@jit
def load_rows(rows, stats_at, seen_at, head, b, begin, step, STAGES: gl.constexpr):
    """Copy the numbers of a tile of rows into the slot of a step, which is empty."""
    slot, _ = slot_of(step, STAGES)
    full = rows.full.index(slot)
    mbarrier.expect(full, 2 * (box_bytes(stats_at) + box_bytes(seen_at)))
    for j in gl.static_range(2):
        tma_load(stats_at, [2 * head + j, begin], full, rows.stats.index(2 * slot + j))
        tma_load(seen_at, [2 * b + j, begin], full, rows.seen.index(2 * slot + j))


@jit
def numbers(memory, slot, BLOCK_T: gl.constexpr):
    """One number of every row of a tile, beside keys."""
    LAYOUT: gl.constexpr = gl.SliceLayout(0, accumulator(BLOCK_T))
    return gl.expand_dims(memory.index(slot).reshape([BLOCK_T]).load(LAYOUT), 0)
