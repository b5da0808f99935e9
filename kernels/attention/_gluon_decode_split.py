"""Few queries over a long cache for Hopper: whole tiles of keys by TMA, products by wgmma.

Shapes, splits, rows and bits are those of _triton_decode, whose `fold` adds up what the splits
leave; this kernel takes its place where the queries that share keys fill a warpgroup's 64 rows
better than a tile of 16: several queries, or many heads a key head.

Floors   bytes: every key and value once for each 64 rows, 2 (D + E) a key; flops: 2 * 64 (D + E) a
         key, 64 flops a byte, a third of where Hopper's matrix units would bind: bytes bind.
Copies   one warp keeps STAGES tiles of keys and of values under way.
Pages    of at least a tile: each tile is one box of one page.
Memory   rows of a tile outside [lo, hi) may hold anything, NaN too: their weights are 0, and
         values at the two ends are zeroed in shared memory before their product.
"""

# pyright: reportArgumentType=false

from __future__ import annotations

from typing import Any, NamedTuple

from swathe.kernels.attention._gluon_forward import absorb, rounded
from swathe.kernels.attention._gluon_tiles import (
    FAR,
    GROUP,
    Queries,
    Ring,
    Scores,
    accumulator,
    added,
    fill,
    landed,
    product,
    ring,
    scaled,
    settled,
    slot_of,
    start_of_softmax,
    tile_of,
    weigh,
    zeros,
)
from swathe.kernels.core.gluon import (
    fence_async_shared,
    gl,
    jit,
    mbarrier,
    partition_barrier,
    warpgroup_mma_wait,
)

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
def _copy(
    k_at, v_at, k, v, call, FEWEST: gl.constexpr, MOST: gl.constexpr, BLOCK_S: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The copying warp."""
    unit = unit_of(call)
    parts = parts_of(call, unit, FEWEST, MOST, BLOCK_S, LANES)
    step = 0
    for split in range(unit.slot, parts.count, call.slots):
        low, final = tiles_of(parts, split, BLOCK_S)
        page, row = where_is(call, unit.b, final * BLOCK_S)
        fill(k, k_at, page, unit.g, row, step, STAGES)
        for i in range(final - low):
            before, behind = page, row
            page, row = where_is(call, unit.b, (final - i - 1) * BLOCK_S)
            fill(k, k_at, page, unit.g, row, step + 1, STAGES)
            fill(v, v_at, before, unit.g, behind, step, STAGES)
            step += 1
        fill(v, v_at, page, unit.g, row, step, STAGES)
        step += 1


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
def _clear(v, slot, start, lo, hi, BLOCK_S: gl.constexpr):
    """Zero the values of a slot that lie outside [lo, hi): what no row sees may be NaN."""
    if (start < lo) | (start + BLOCK_S > hi):
        n = start + gl.arange(0, BLOCK_S, layout=gl.SliceLayout(1, WIDE))
        seen = gl.expand_dims((n >= lo) & (n < hi), 1)
        for i in gl.static_range(len(v)):
            tile = tile_of(v[i], slot)
            rows = tile.load(WIDE)
            tile.store(gl.where(seen, rows, gl.zeros_like(rows)))
        fence_async_shared()
        partition_barrier()


@jit
def _store_rows(at, row, live, tile, E):
    """Write sums whose rows lie `row` elements past `at`, rounded to the memory's dtype."""
    begin = 0
    for i in gl.static_range(len(tile)):
        begin = store_piece(at, row, live, tile[i], begin, E)


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
def _store(call, unit, split, count, acc, total, peak, LAYOUT: gl.constexpr):
    """o and lse of rows whose keys are all in one split, else the sums of this one."""
    r = unit.begin + gl.arange(0, GROUP, layout=LAYOUT)
    t, h = r // call.groups, unit.g * call.groups + r % call.groups
    H, live = call.K * call.groups, t < call.T
    out = (unit.b.to(gl.int64) * H + h) * call.T + t
    if count == 1:
        share, lse = settled(total, peak)
        at = ((unit.b.to(gl.int64) * call.T + t) * H + h) * call.E
        _store_rows(call.o, at, live, scaled(acc, share), call.E)
        gl.store(call.lse + out, lse, live)
    elif call.parts is not None:
        at = out * call.splits + split
        _store_rows(call.parts, at * call.E, live, acc, call.E)
        store_sums(call, at, live, total, peak)


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
def _slopes(call, unit, LAYOUT: gl.constexpr):
    r = unit.begin + gl.arange(0, GROUP, layout=LAYOUT)
    h = unit.b * call.alibi_b + unit.g * call.groups + r % call.groups
    return gl.expand_dims(gl.load(call.alibi + h, r // call.groups < call.T, other=0.0), 1)


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
def _attend_split(
    split, step, parts, q, k, v, call, unit, rows, scores, SCORED: gl.constexpr,
    SOFTCAP: gl.constexpr, BLOCK_S: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The sums over one split's keys, and the next step."""
    ROW: gl.constexpr = gl.SliceLayout(1, accumulator(BLOCK_S))
    COLUMN: gl.constexpr = gl.SliceLayout(0, accumulator(BLOCK_S))
    low, final = tiles_of(parts, split, BLOCK_S)
    total, peak = start_of_split(call, unit, parts.count, ROW)
    slot, full = slot_of(step, STAGES)
    mbarrier.wait(k.full.index(slot), full)
    s = warpgroup_mma_wait(0, deps=[product(q.memory, 0, k.memory, slot)])
    mbarrier.arrive(k.empty.index(slot), count=1)
    n = gl.expand_dims(final * BLOCK_S + gl.arange(0, BLOCK_S, layout=COLUMN), 0)
    weights, _, total, peak = weigh(s, rows, n, scores, total, peak, SCORED, SOFTCAP, True)
    p, acc = rounded(weights, v), zeros(v.memory)
    mbarrier.wait(v.full.index(slot), full)
    _clear(v.memory, slot, final * BLOCK_S, parts.lo, parts.hi, BLOCK_S)
    slot, full = slot_of(step + 1, STAGES)
    mbarrier.wait(k.full.index(slot), full, pred=final > low)
    _, step, p, acc, total, peak = absorb(
        final - 1, low, low, step + 1, p, acc, total, peak, q, k, v, 0, rows, scores, SCORED,
        SOFTCAP, True, BLOCK_S, STAGES,
    )  # fmt: skip
    slot, full = slot_of(step - 1, STAGES)
    mbarrier.wait(v.full.index(slot), full)
    _clear(v.memory, slot, low * BLOCK_S, parts.lo, parts.hi, BLOCK_S)
    acc, _ = landed(added(acc, p, v.memory, slot), p, p)
    mbarrier.arrive(v.empty.index(slot), count=1)
    return acc, total, peak, step


@jit
def _consume(
    q, k, v, call, SCORED: gl.constexpr, SOFTCAP: gl.constexpr, FEWEST: gl.constexpr,
    MOST: gl.constexpr, BLOCK_S: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warpgroup: every slots-th split of its rows."""
    ROW: gl.constexpr = gl.SliceLayout(1, accumulator(BLOCK_S))
    unit = unit_of(call)
    parts = parts_of(call, unit, FEWEST, MOST, BLOCK_S, ROW)
    if unit.slot < parts.count:
        load_queries(q.memory, call, unit)
        rows, slopes, step = rows_of(call, unit, ROW), call.alibi, 0
        if slopes is not None:
            slopes = _slopes(call, unit, ROW)
        scores = Scores(call.scale, call.softcap, slopes)
        for split in range(unit.slot, parts.count, call.slots):
            acc, total, peak, step = _attend_split(
                split, step, parts, q, k, v, call, unit, rows, scores, SCORED, SOFTCAP, BLOCK_S,
                STAGES,
            )  # fmt: skip
            _store(call, unit, split, parts.count, acc, total, peak, ROW)


PLAIN = [
    "bound_b", "bound_t", "place_b", "table_b", "alibi_b", "T", "S", "B", "K", "groups", "splits",
    "slots", "shift", "page", "scale", "softcap",
]  # fmt: skip


@jit(do_not_specialize=PLAIN)
def attend(
    q_ptr, k0, k1, v0, v1, o_ptr, lse_ptr, parts_ptr, sums_ptr, first_ptr, last_ptr, places_ptr,
    table_ptr, sinks_ptr, alibi_ptr, q_b, q_h, q_t, D, E, bound_b, bound_t, place_b, table_b,
    alibi_b, T, S, B, K, groups, splits, slots, shift, page, scale, softcap, SCORED: gl.constexpr,
    SOFTCAP: gl.constexpr, FEWEST: gl.constexpr, MOST: gl.constexpr, BLOCK_S: gl.constexpr,
    STAGES: gl.constexpr, LEAST: gl.constexpr,
):  # fmt: skip
    """Every slots-th split of 64 packed rows: o and lse if it is the only one, else its sums."""
    call = Call(
        q_ptr, o_ptr, lse_ptr, parts_ptr, sums_ptr, first_ptr, last_ptr, places_ptr, table_ptr,
        sinks_ptr, alibi_ptr, q_b, q_h, q_t, D, E, bound_b, bound_t, place_b, table_b, alibi_b, T,
        S, B, K, groups, splits, slots, shift, page, scale, softcap,
    )  # fmt: skip
    k_at, v_at = (k0,), (v0,)
    if k1 is not None:
        k_at = (k0, k1)
    if v1 is not None:
        v_at = (v0, v1)
    q = Ring(room_for(k_at), None, None)  # written once, by those who read it
    k, v = ring(k_at, STAGES, 1), ring(v_at, STAGES, 1)
    gl.warp_specialize(
        [
            (_consume, (q, k, v, call, SCORED, SOFTCAP, FEWEST, MOST, BLOCK_S, STAGES)),
            (_copy, (k_at, v_at, k, v, call, FEWEST, MOST, BLOCK_S, STAGES)),
        ],
        [1],
        [LEAST],
    )


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
