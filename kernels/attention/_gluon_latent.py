"""Attention over DeepSeek's latent cache (absorbed MLA) for Hopper: values are a part of the keys.

    k (B, 1, S, 576), v = k[..., :512] in the same memory, q (B, H, T, 576): every head shares them

Two warpgroups hold the same 64 packed rows of (query, head). Each takes all of their scores and its
half of the values' features, so that neither hands weights to the other: 2 * 576 + 512 products a
row and key where 576 + 512 are needed, for no exchange and half the accumulators.

Floors   bytes: 2 * 576 a key for each 64 rows; flops: 2 * 64 * (576 + 512) a key, 121 a byte, and
         185 with the scores taken twice: bytes and matrix units bind about alike.
Memory   one ring of keys is all, 221 KB of queries and two tiles; a tile is loaded while the other
         is worked on, and one warpgroup's softmax runs beside the other's products.
Splits   and rows, pages and bits are _gluon_splits's, whose sums `fold` adds up.
"""

# pyright: reportArgumentType=false

from __future__ import annotations

from swathe.kernels.attention._gluon_splits import (
    LANES,
    WIDE,
    Call,
    load_queries,
    parts_of,
    room_for,
    rows_of,
    start_of_split,
    store_piece,
    store_sums,
    tiles_of,
    unit_of,
    where_is,
)
from swathe.kernels.attention._gluon_tiles import (
    GROUP,
    Scores,
    accumulator,
    fill,
    operand,
    product,
    ring,
    settled,
    slot_of,
    tile_of,
    weigh,
)
from swathe.kernels.core.gluon import (
    fence_async_shared,
    gl,
    jit,
    mbarrier,
    partition_barrier,
    sync_warpgroups,
    warpgroup_mma,
    warpgroup_mma_wait,
)

STAGES = gl.constexpr(2)
HALF = gl.constexpr(256)  # features of the values that a warpgroup sums
STRIP = gl.constexpr(64)  # that are zeroed at once: registers are few beside the sums
_MEET = gl.constexpr(8)  # named barrier of both warpgroups
_THREADS = gl.constexpr(256)


@jit
def _copy(at, k, call, FEWEST: gl.constexpr, MOST: gl.constexpr, BLOCK_S: gl.constexpr):
    """The copying warp."""
    unit = unit_of(call)
    parts = parts_of(call, unit, FEWEST, MOST, BLOCK_S, LANES)
    step = 0
    for split in range(unit.slot, parts.count, call.slots):
        low, final = tiles_of(parts, split, BLOCK_S)
        for tile in range(low, final + 1):
            page, row = where_is(call, unit.b, tile * BLOCK_S)
            fill(k, at, page, unit.g, row, step, STAGES)
            step += 1


@jit
def _clear(values, start, lo, hi, BLOCK_S: gl.constexpr):
    """Zero this warpgroup's values outside [lo, hi), once both have taken their scores."""
    if (start < lo) | (start + BLOCK_S > hi):
        sync_warpgroups(_MEET, _THREADS)
        n = start + gl.arange(0, BLOCK_S, layout=gl.SliceLayout(1, WIDE))
        seen = gl.expand_dims((n >= lo) & (n < hi), 1)
        for i in gl.static_range(HALF // STRIP):
            _clear_strip(values.slice(i * STRIP, STRIP, dim=1), seen)
        fence_async_shared()
        partition_barrier()


@jit
def _clear_strip(values, seen):
    rows = values.load(WIDE)
    values.store(gl.where(seen, rows, gl.zeros_like(rows)))


@jit
def _absorb(
    INDEX: gl.constexpr, tile, stop, step, acc, total, peak, parts, q, k, rows, scores,
    SCORED: gl.constexpr, SOFTCAP: gl.constexpr, BLOCK_S: gl.constexpr, EDGE: gl.constexpr,
):  # fmt: skip
    """Absorb the key tiles from `tile` to before `stop`; EDGE: they may hold what no row sees."""
    COLUMN: gl.constexpr = gl.SliceLayout(0, accumulator(BLOCK_S))
    BY_ROW: gl.constexpr = gl.SliceLayout(1, accumulator(HALF))
    while tile < stop:
        slot, full = slot_of(step, STAGES)
        mbarrier.wait(k.full.index(slot), full)
        s = warpgroup_mma_wait(0, deps=[product(q, 0, k.memory, slot)])
        n = gl.expand_dims(tile * BLOCK_S + gl.arange(0, BLOCK_S, layout=COLUMN), 0)
        weights, shrink, total, peak = weigh(s, rows, n, scores, total, peak, SCORED, SOFTCAP, True)
        values = tile_of(k.memory[0], slot).slice(INDEX * HALF, HALF, dim=1)
        if EDGE:
            _clear(values, tile * BLOCK_S, parts.lo, parts.hi, BLOCK_S)
        p = gl.convert_layout(weights.to(values.dtype), operand(HALF), assert_trivial=True)
        acc = acc * gl.expand_dims(gl.convert_layout(shrink, BY_ROW), 1)
        acc, _ = warpgroup_mma_wait(0, deps=[warpgroup_mma(p, values, acc, is_async=True), p])
        mbarrier.arrive(k.empty.index(slot), count=1)
        step += 1
        tile += 1
    return step, acc, total, peak


@jit
def _attend_split(
    INDEX: gl.constexpr, split, step, parts, q, k, call, unit, rows, SCORED: gl.constexpr,
    SOFTCAP: gl.constexpr, BLOCK_S: gl.constexpr,
):  # fmt: skip
    """The sums of one split's keys over this warpgroup's features, and the next step."""
    ROW: gl.constexpr = gl.SliceLayout(1, accumulator(BLOCK_S))
    scores = Scores(call.scale, call.softcap, None)
    total, peak = start_of_split(call, unit, parts.count, ROW)
    acc = gl.zeros([GROUP, HALF], gl.float32, accumulator(HALF))
    low, final = tiles_of(parts, split, BLOCK_S)
    tile = low
    for part in gl.static_range(3):
        stop = low + 1 if part == 0 else final if part == 1 else final + 1
        step, acc, total, peak = _absorb(
            INDEX, tile, stop, step, acc, total, peak, parts, q, k, rows, scores, SCORED, SOFTCAP,
            BLOCK_S, part != 1,
        )  # fmt: skip
        tile = gl.maximum(tile, stop)
    return acc, total, peak, step


@jit
def _store(INDEX: gl.constexpr, call, unit, split, count, acc, total, peak, LAYOUT: gl.constexpr):
    """This warpgroup's half of o, or of the sums; what belongs to whole rows is the first's."""
    # always the unit's rows, but made in here: addresses made before the loop would fill registers
    r = unit.begin + gl.minimum(split, 0) + gl.arange(0, GROUP, layout=LAYOUT)
    t, h = r // call.groups, unit.g * call.groups + r % call.groups
    H, live = call.K * call.groups, t < call.T
    out = (unit.b.to(gl.int64) * H + h) * call.T + t
    if count == 1:
        share, lse = settled(total, peak)
        at = ((unit.b.to(gl.int64) * call.T + t) * H + h) * call.E
        BY_ROW: gl.constexpr = gl.SliceLayout(1, accumulator(HALF))
        acc = acc * gl.expand_dims(gl.convert_layout(share, BY_ROW), 1)
        store_piece(call.o, at, live, acc, INDEX * HALF, call.E)
        if INDEX == 0:
            gl.store(call.lse + out, lse, live)
    elif call.parts is not None:
        at = out * call.splits + split
        store_piece(call.parts, at * call.E, live, acc, INDEX * HALF, call.E)
        if INDEX == 0:
            store_sums(call, at, live, total, peak)


@jit
def _consume(
    INDEX: gl.constexpr, q, k, call, SCORED: gl.constexpr, SOFTCAP: gl.constexpr,
    FEWEST: gl.constexpr, MOST: gl.constexpr, BLOCK_S: gl.constexpr,
):  # fmt: skip
    """A warpgroup: its half of every slots-th split."""
    ROW: gl.constexpr = gl.SliceLayout(1, accumulator(BLOCK_S))
    unit = unit_of(call)
    parts = parts_of(call, unit, FEWEST, MOST, BLOCK_S, ROW)
    if unit.slot < parts.count:
        if INDEX == 0:
            load_queries(q, call, unit)
        sync_warpgroups(_MEET, _THREADS)
        rows, step = rows_of(call, unit, ROW), 0
        for split in range(unit.slot, parts.count, call.slots):
            acc, total, peak, step = _attend_split(
                INDEX, split, step, parts, q, k, call, unit, rows, SCORED, SOFTCAP, BLOCK_S
            )
            _store(INDEX, call, unit, split, parts.count, acc, total, peak, ROW)


PLAIN = [
    "bound_b", "bound_t", "place_b", "table_b", "T", "S", "B", "K", "groups", "splits", "slots",
    "shift", "page", "scale", "softcap",
]  # fmt: skip


@jit(do_not_specialize=PLAIN)
def attend_latent(
    q_ptr, k0, k1, o_ptr, lse_ptr, parts_ptr, sums_ptr, first_ptr, last_ptr, places_ptr, table_ptr,
    sinks_ptr, q_b, q_h, q_t, D, E, bound_b, bound_t, place_b, table_b, T, S, B, K, groups, splits,
    slots, shift, page, scale, softcap, SCORED: gl.constexpr, SOFTCAP: gl.constexpr,
    FEWEST: gl.constexpr, MOST: gl.constexpr, BLOCK_S: gl.constexpr, REGISTERS: gl.constexpr,
    LEAST: gl.constexpr,
):  # fmt: skip
    """Every slots-th split of 64 packed rows: o and lse if it is the only one, else its sums."""
    call = Call(
        q_ptr, o_ptr, lse_ptr, parts_ptr, sums_ptr, first_ptr, last_ptr, places_ptr, table_ptr,
        sinks_ptr, None, q_b, q_h, q_t, D, E, bound_b, bound_t, place_b, table_b, 0, T, S, B, K,
        groups, splits, slots, shift, page, scale, softcap,
    )  # fmt: skip
    q = room_for((k0, k1))
    k = ring((k0, k1), STAGES, 2)
    gl.warp_specialize(
        [
            (_consume, (0, q, k, call, SCORED, SOFTCAP, FEWEST, MOST, BLOCK_S)),
            (_consume, (1, q, k, call, SCORED, SOFTCAP, FEWEST, MOST, BLOCK_S)),
            (_copy, ((k0, k1), k, call, FEWEST, MOST, BLOCK_S)),
        ],
        [4, 1],
        [REGISTERS, LEAST],
    )
