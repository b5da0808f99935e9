"""dq on Hopper."""

# pyright: reportArgumentType=false

from __future__ import annotations

from typing import Any, NamedTuple

from swathe.kernels.attention._gluon_tiles import (
    GROUP,
    LOG2E,
    Bounds,
    Scores,
    accumulator,
    added,
    fill,
    landed,
    load,
    logits,
    product,
    queries,
    ring,
    slot_of,
    extents,
    tile_of,
    zeros,
)
from swathe.kernels.core.gluon import (
    fence_async_shared,
    gl,
    jit,
    mbarrier,
    partition_barrier,
    tma_store,
    tma_store_wait,
    warpgroup_mma_wait,
)

ROUND = gl.constexpr(128)  # rows of `stats` and `seen` are rounded up to this
_WIDE = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # 64 features a pass


class Call(NamedTuple):
    """What a call has besides tiles: pointers (None if not given), strides, sizes and numbers."""

    do: Any
    dlse: Any
    o: Any
    lse: Any
    stats: Any
    seen: Any
    first: Any
    last: Any
    places: Any
    alibi: Any
    do_b: Any
    do_h: Any
    do_t: Any
    o_b: Any
    o_h: Any
    o_t: Any
    bound_b: Any
    bound_t: Any
    place_b: Any
    alibi_b: Any
    E: Any
    T: Any
    S: Any
    H: Any
    shift: Any
    scale: Any
    softcap: Any


class Tile(NamedTuple):
    """One row tile: first row, head, sequence, and its stretches of keys."""

    begin: Any
    h: Any
    b: Any
    lo: Any
    whole_from: Any
    whole_to: Any
    hi: Any


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
    """Store this warpgroup's rows, piece by piece, by way of shared memory that is free."""
    for i in gl.static_range(len(memory)):
        tile_of(memory[i], slot).store(value[i].to(to[i].dtype))
    fence_async_shared()
    partition_barrier()
    tma_store(to[0], [b, h, row, 0], memory[0].index(slot))
    if len(memory) == 2:
        tma_store(to[1], [b, h, row, to[0].block_shape[3]], memory[1].index(slot))


@jit
def _copy(
    q_at, do_at, k_at, v_at, q, do, k, v, tile, groups, BLOCK_S: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that copies: the rows of both warpgroups, then tiles of keys and values."""
    for i in gl.static_range(2):
        load(q, q_at, tile.b, tile.h, tile.begin + i * GROUP, i)
        load(do, do_at, tile.b, tile.h, tile.begin + i * GROUP, i)
    g, step = tile.h // groups, 0
    for start in range(tile.lo, tile.hi, BLOCK_S):
        fill(k, k_at, tile.b, g, start, step, K_STAGES)
        fill(v, v_at, tile.b, g, start, step, V_STAGES)
        step += 1


@jit
def _delta(call, tile, begin, WIDTH: gl.constexpr):
    """The sum of do * o of every row, both read from memory as they lie there."""
    row = begin + gl.arange(0, GROUP, layout=gl.SliceLayout(1, _WIDE))
    live, wide = gl.expand_dims(row < call.T, 1), gl.expand_dims(row.to(gl.int64), 1)
    b, h = tile.b.to(gl.int64), tile.h.to(gl.int64)
    do = call.do + b * call.do_b + h * call.do_h + wide * call.do_t
    o = call.o + b * call.o_b + h * call.o_h + wide * call.o_t
    total = gl.zeros([GROUP], gl.float32, gl.SliceLayout(1, _WIDE))
    for i in gl.static_range(WIDTH // 64):
        feature = i * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, _WIDE))
        feature = gl.expand_dims(feature, 0)
        there = live & (feature < call.E)
        left = gl.load(do + feature, there, other=0.0).to(gl.float32)
        total += gl.sum(left * gl.load(o + feature, there, other=0.0).to(gl.float32), 1)
    return total


@jit
def _row_stats(call, tile, begin, rows, WIDTH: gl.constexpr, ROW: gl.constexpr):
    """lse2 and delta of rows, also stored with what they see for `backward_kv`.

    A row that sees nothing has no weight: its lse2 is inf, as is that of rows past the last.
    """
    head = (tile.b * call.H + tile.h).to(gl.int64)
    live = rows.index < call.T
    delta = gl.convert_layout(_delta(call, tile, begin, WIDTH), ROW)
    if call.dlse is not None:
        delta -= gl.load(call.dlse + head * call.T + rows.index, live, other=0.0) * LOG2E
    lse = gl.load(call.lse + head * call.T + rows.index, live, other=float("-inf"))
    lse = gl.where(lse == float("-inf"), float("inf"), lse)
    span = gl.cdiv(call.T, ROUND) * ROUND
    stats = call.stats + head * 2 * span + rows.index
    gl.store(stats, lse)
    gl.store(stats + span, delta)
    if tile.h == 0:
        seen = call.seen + tile.b.to(gl.int64) * 2 * span + rows.index
        gl.store(seen, gl.convert_layout(gl.reshape(rows.first, [GROUP]), ROW))
        gl.store(seen + span, gl.convert_layout(gl.reshape(rows.last, [GROUP]), ROW))
    return gl.expand_dims(lse, 1), gl.expand_dims(delta, 1)


@jit
def _descend(
    INDEX: gl.constexpr, dq_at, q, do, k, v, tile, call, SCORED: gl.constexpr,
    SOFTCAP: gl.constexpr, BLOCK_S: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    WIDTH: gl.constexpr,
):  # fmt: skip
    """A warpgroup: dq of its 64 rows."""
    ROW: gl.constexpr = gl.SliceLayout(1, accumulator(BLOCK_S))
    COLUMN: gl.constexpr = gl.SliceLayout(0, accumulator(BLOCK_S))
    alibi, places = call.alibi, call.places
    if alibi is not None:
        alibi = gl.load(alibi + tile.b * call.alibi_b + tile.h)
    if places is not None:
        places += tile.b * call.place_b
    scores = Scores(call.scale, call.softcap, alibi)
    bounds = Bounds(call.first, call.last, tile.b * call.bound_b, call.bound_t)
    begin = tile.begin + INDEX * GROUP
    rows = queries(bounds, places, begin, call.T, call.S, call.shift, 1, GROUP, ROW)
    lse, delta = _row_stats(call, tile, begin, rows, WIDTH, ROW)
    dq = zeros(q.memory)
    mbarrier.wait(q.full.index(INDEX), 0)
    mbarrier.wait(do.full.index(INDEX), 0)
    step = 0
    for start in range(tile.lo, tile.hi, BLOCK_S):
        at_k, full_k = slot_of(step, K_STAGES)
        at_v, full_v = slot_of(step, V_STAGES)
        mbarrier.wait(k.full.index(at_k), full_k)
        own = INDEX + (step >> 30)
        s = product(q.memory, own, k.memory, at_k)
        mbarrier.wait(v.full.index(at_v), full_v)
        dp = product(do.memory, own, v.memory, at_v)
        s = warpgroup_mma_wait(1, deps=[s])
        n = gl.expand_dims(start + gl.arange(0, BLOCK_S, layout=COLUMN), 0)
        z, factor, t = logits(s, rows, n, scores, SCORED, SOFTCAP, False)
        if (start < tile.whole_from) | (start + BLOCK_S > tile.whole_to):
            z = gl.where((n >= rows.first) & (n < rows.last), z, float("-inf"))
        _, slope = weights(z, factor, lse, t, SOFTCAP)
        # the turn of a loop: without one, ptxas waits for dp before the exponentials
        ahead, full_ahead = slot_of(step + 1, K_STAGES)
        mbarrier.wait(k.full.index(ahead), full_ahead, pred=start + BLOCK_S < tile.hi)
        dp, slope = warpgroup_mma_wait(0, deps=[dp, slope])
        mbarrier.arrive(v.empty.index(at_v), count=1)
        ds = (slope * (dp - delta)).to(dq_at[0].dtype)
        dq, _ = landed(added(dq, ds, k.memory, at_k), ds)
        mbarrier.arrive(k.empty.index(at_k), count=1)
        step += 1
    store(dq_at, q.memory, INDEX, times(dq, call.scale), tile.b, tile.h, begin)
    tma_store_wait(0)


PLAIN = ["T", "S", "H", "groups", "shift", "scale", "softcap"]


@jit(do_not_specialize=PLAIN)
def backward_q(
    do_ptr, dlse_ptr, o_ptr, lse_ptr, stats_ptr, seen_ptr, reach_ptr, whole_ptr, first_ptr,
    last_ptr, places_ptr, alibi_ptr, do0, do1, q0, q1, k0, k1, v0, v1, dq0, dq1, do_b, do_h, do_t,
    o_b, o_h, o_t, bound_b, bound_t, place_b, alibi_b, E, T, S, H, groups, shift, scale, softcap,
    SCORED: gl.constexpr, SOFTCAP: gl.constexpr, BLOCK_S: gl.constexpr, K_STAGES: gl.constexpr,
    V_STAGES: gl.constexpr, REGISTERS: gl.constexpr, LEAST: gl.constexpr,
):  # fmt: skip
    """dq of one tile of 128 queries of one head; delta and its rows' reach on the way."""
    ROWS: gl.constexpr = 2 * GROUP
    tiles = gl.cdiv(T, ROWS)
    turn = gl.program_id(0)
    tile, h, b = tiles - 1 - turn % tiles, turn // tiles % H, turn // tiles // H
    bounds = Bounds(first_ptr, last_ptr, b * bound_b, bound_t)
    lo, hi, whole_from, whole_to = extents(
        bounds, tile * ROWS, T, S, ROWS, gl.BlockedLayout([1], [32], [4], [0])
    )
    lo = gl.minimum(lo, hi) // BLOCK_S * BLOCK_S
    if h == 0:
        at = (b * tiles + tile) * 2
        gl.store(reach_ptr + at, lo)
        gl.store(reach_ptr + at + 1, hi)
        gl.store(whole_ptr + at, whole_from)
        gl.store(whole_ptr + at + 1, whole_to)
    call = Call(
        do_ptr, dlse_ptr, o_ptr, lse_ptr, stats_ptr, seen_ptr, first_ptr, last_ptr, places_ptr,
        alibi_ptr, do_b, do_h, do_t, o_b, o_h, o_t, bound_b, bound_t, place_b, alibi_b, E, T, S, H,
        shift, scale, softcap,
    )  # fmt: skip
    tile = Tile(tile * ROWS, h, b, lo, whole_from, whole_to, hi)
    q_at, k_at, dq_at, v_at, do_at = (q0,), (k0,), (dq0,), (v0,), (do0,)
    if q1 is not None:
        q_at, k_at, dq_at = (q0, q1), (k0, k1), (dq0, dq1)
    WIDTH: gl.constexpr = do0.block_shape[3] + (0 if do1 is None else do1.block_shape[3])
    if v1 is not None:
        v_at, do_at = (v0, v1), (do0, do1)
    q, do = ring(q_at, 2, 1), ring(do_at, 2, 1)
    k, v = ring(k_at, K_STAGES, 2), ring(v_at, V_STAGES, 2)
    gl.warp_specialize([
        (_descend, (0, dq_at, q, do, k, v, tile, call, SCORED, SOFTCAP, BLOCK_S, K_STAGES, V_STAGES, WIDTH)),
        (_descend, (1, dq_at, q, do, k, v, tile, call, SCORED, SOFTCAP, BLOCK_S, K_STAGES, V_STAGES, WIDTH)),
        (_copy, (q_at, do_at, k_at, v_at, q, do, k, v, tile, groups, BLOCK_S, K_STAGES, V_STAGES)),
    ], [4, 1], [REGISTERS, LEAST])  # fmt: skip
