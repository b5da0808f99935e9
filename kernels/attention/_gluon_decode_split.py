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
# mypy: disable-error-code="assignment"

from __future__ import annotations

from swathe.kernels.attention._gluon_forward import Work, absorb, softmax
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
    tile_of,
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
def _slopes(call, unit, LAYOUT: gl.constexpr):
    r = unit.begin + gl.arange(0, GROUP, layout=LAYOUT)
    h = unit.b * call.alibi_b + unit.g * call.groups + r % call.groups
    return gl.expand_dims(gl.load(call.alibi + h, r // call.groups < call.T, other=0.0), 1)


@jit
def _attend_split(
    split, step, parts, q, k, v, call, unit, rows, scores, SCORED: gl.constexpr,
    SOFTCAP: gl.constexpr, BLOCK_S: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The sums over one split's keys, and the next step."""
    ROW: gl.constexpr = gl.SliceLayout(1, accumulator(BLOCK_S))
    low, final = tiles_of(parts, split, BLOCK_S)
    total, peak = start_of_split(call, unit, parts.count, ROW)
    slot, full = slot_of(step, STAGES)
    mbarrier.wait(k.full.index(slot), full)
    s = warpgroup_mma_wait(0, deps=[product(q.memory, 0, k.memory, slot)])
    mbarrier.arrive(k.empty.index(slot), count=1)
    p, _, total, peak = softmax(
        s, final, rows, scores, total, peak, v, SCORED, SOFTCAP, True, BLOCK_S
    )
    mbarrier.wait(v.full.index(slot), full)
    _clear(v.memory, slot, final * BLOCK_S, parts.lo, parts.hi, BLOCK_S)
    slot, full = slot_of(step + 1, STAGES)
    mbarrier.wait(k.full.index(slot), full, pred=final > low)
    work = Work(None, q, k, v, None, None)
    _, step, p, acc, total, peak = absorb(
        0, work, final - 1, low, low, step + 1, p, zeros(v.memory), total, peak, rows, scores,
        SCORED, SOFTCAP, True, BLOCK_S, STAGES,
    )  # fmt: skip
    slot, full = slot_of(step - 1, STAGES)
    mbarrier.wait(v.full.index(slot), full)
    _clear(v.memory, slot, low * BLOCK_S, parts.lo, parts.hi, BLOCK_S)
    acc, _ = landed(added(acc, p, v.memory, slot), p)
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
