"""What kernels for few queries over a long cache share: packed rows, splits, pages, sums.

Shapes, splits, rows and bits are those of _triton_decode, whose `fold` adds up what splits leave.
A unit is 64 packed rows of (query, head of a group) that share keys; its keys [lo, hi) are split by
lo and hi alone, and a program takes every slots-th split.
"""

# pyright: reportArgumentType=false

from __future__ import annotations

from typing import Any, NamedTuple

from swathe.kernels.attention._gluon_tiles import (
    FAR,
    GROUP,
    Queries,
    accumulator,
    start_of_softmax,
    tile_of,
)
from swathe.kernels.core.gluon import fence_async_shared, gl, jit, partition_barrier

LANES = gl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))  # of the warp that copies
WIDE = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # 16 bytes a thread


class Call(NamedTuple):
    """What a call has besides tiles of keys: pointers (None if not given), sizes and numbers."""

    q: Any
    o: Any
    lse: Any
    parts: Any
    sums: Any
    first: Any
    last: Any
    places: Any
    table: Any
    sinks: Any
    alibi: Any
    q_b: Any
    q_h: Any
    q_t: Any
    D: Any
    E: Any
    bound_b: Any
    bound_t: Any
    place_b: Any
    table_b: Any
    alibi_b: Any
    T: Any
    S: Any
    B: Any
    K: Any
    groups: Any
    splits: Any
    slots: Any
    shift: Any
    page: Any
    scale: Any
    softcap: Any


class Unit(NamedTuple):
    """What one program works on: rows from `begin` on, key head, sequence, its first split."""

    begin: Any
    g: Any
    b: Any
    slot: Any


class Parts(NamedTuple):
    """Keys [lo, hi) that rows see, where their first tile begins, keys of a split, and splits."""

    lo: Any
    hi: Any
    begin: Any
    each: Any
    count: Any


@jit
def unit_of(call):
    """As _triton_decode.attend: tiles that share keys side by side, late splits last."""
    p, tiles = gl.program_id(0), gl.cdiv(call.T * call.groups, GROUP)
    g, b = p // tiles % call.K, p // tiles // call.K % call.B
    return Unit(p % tiles * GROUP, g, b, p // tiles // call.K // call.B)


@jit
def _intervals(call, b, r):
    """First and last key of packed rows r, FAR and 0 of one that sees none."""
    t = r // call.groups
    at, live = b * call.bound_b + t * call.bound_t, t < call.T
    first = gl.maximum(gl.load(call.first + at, live, other=0), 0)
    last = gl.minimum(gl.load(call.last + at, live, other=0), call.S)
    some = first < last
    return gl.where(some, first, FAR), gl.where(some, last, 0)


@jit
def parts_of(
    call, unit, FEWEST: gl.constexpr, MOST: gl.constexpr, BLOCK_S: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """As _triton_decode.partition, which `fold` asks: both must split alike."""
    first, last = _intervals(call, unit.b, unit.begin + gl.arange(0, GROUP, layout=LAYOUT))
    lo, hi = gl.min(first, 0), gl.max(last, 0)
    begin = gl.minimum(lo, hi) // BLOCK_S * BLOCK_S
    tiles = gl.cdiv(hi - begin, BLOCK_S)
    splits = gl.maximum(gl.minimum(gl.cdiv(tiles * BLOCK_S, FEWEST), MOST), 1)
    each = gl.maximum(gl.cdiv(tiles, splits), 1)
    return Parts(lo, hi, begin, each * BLOCK_S, gl.maximum(gl.cdiv(tiles, each), 1))


@jit
def tiles_of(parts, split, BLOCK_S: gl.constexpr):
    """The first and the last tile of a split; one whose keys are all hidden where there is none."""
    start = parts.begin + split * parts.each
    end = gl.minimum(start + parts.each, parts.hi)
    low = start // BLOCK_S
    return low, gl.maximum(gl.cdiv(end, BLOCK_S) - 1, low)


@jit
def where_is(call, b, start):
    """Where TMA finds the keys from `start` on: a page and a row of it."""
    if call.table is None:
        return b, start
    else:
        return gl.load(call.table + b * call.table_b + start // call.page), start % call.page


@jit
def load_queries(q, call, unit):
    """Packed rows of q into shared memory, 0 past the last one and past D."""
    r = unit.begin + gl.arange(0, GROUP, layout=gl.SliceLayout(1, WIDE))
    t, h = r // call.groups, unit.g * call.groups + r % call.groups
    at = unit.b.to(gl.int64) * call.q_b + h.to(gl.int64) * call.q_h + t.to(gl.int64) * call.q_t
    begin = 0
    for i in gl.static_range(len(q)):
        begin = _load_piece(tile_of(q[i], 0), call, at, t < call.T, begin)
    fence_async_shared()
    partition_barrier()


@jit
def _load_piece(memory, call, at, live, begin):
    WIDTH: gl.constexpr = memory.shape[1]
    d = begin + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, WIDE))
    there = gl.expand_dims(live, 1) & gl.expand_dims(d < call.D, 0)
    memory.store(gl.load(call.q + gl.expand_dims(at, 1) + gl.expand_dims(d, 0), there, other=0.0))
    return begin + WIDTH


@jit
def store_piece(at, row, live, piece, begin, E):
    WIDTH: gl.constexpr = piece.shape[1]
    LAYOUT: gl.constexpr = accumulator(WIDTH)
    row = gl.convert_layout(row, gl.SliceLayout(1, LAYOUT))
    live = gl.convert_layout(live, gl.SliceLayout(1, LAYOUT))
    d = begin + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    there = gl.expand_dims(live, 1) & gl.expand_dims(d < E, 0)
    value = piece.to(at.dtype.element_ty)
    gl.store(at + gl.expand_dims(row, 1) + gl.expand_dims(d, 0), value, there)
    return begin + WIDTH


@jit
def store_sums(call, at, live, total, peak):
    """What `fold` needs of a row's split besides its sums of values."""
    gl.store(call.sums + 2 * at, peak, live)
    gl.store(call.sums + 2 * at + 1, total, live)


@jit
def rows_of(call, unit, LAYOUT: gl.constexpr):
    """The packed rows beside keys."""
    r = unit.begin + gl.arange(0, GROUP, layout=LAYOUT)
    t = r // call.groups
    first, last = _intervals(call, unit.b, r)
    place = t + call.shift
    if call.places is not None:
        place = gl.load(call.places + unit.b * call.place_b + t, t < call.T, other=0)
    first, last = gl.expand_dims(first, 1), gl.expand_dims(last, 1)
    return Queries(t, first, last, gl.expand_dims(place, 1))


@jit
def start_of_split(call, unit, count, LAYOUT: gl.constexpr):
    """Total and peak before the first key: a sink is one, where no `fold` follows that adds it."""
    r = unit.begin + gl.arange(0, GROUP, layout=LAYOUT)
    h = gl.minimum(unit.g * call.groups + r % call.groups, call.K * call.groups - 1)
    total, peak = start_of_softmax(call.sinks, h, LAYOUT)
    if call.sinks is not None:
        alone = count == 1
        total = gl.where(alone, total, 0.0)
        peak = gl.where(alone, peak, float("-inf"))
    return total, peak


@jit
def room_for(descriptors):
    """Shared memory for one tile of queries, in pieces like the keys'."""
    memory = ()
    for i in gl.static_range(len(descriptors)):
        memory = memory + (_piece(descriptors[i]),)
    return memory


@jit
def _piece(descriptor):
    WIDTH: gl.constexpr = descriptor.block_shape[3]
    SHAPE: gl.constexpr = [1, 1, 1, GROUP, WIDTH]
    return gl.allocate_shared_memory(descriptor.dtype, SHAPE, descriptor.layout)
