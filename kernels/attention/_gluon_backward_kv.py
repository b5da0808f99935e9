"""dk and dv on Hopper."""

# pyright: reportArgumentType=false

from __future__ import annotations

from typing import Any, NamedTuple

from swathe.kernels.attention._gluon_backward_q import store, times, weights
from swathe.kernels.attention._gluon_tiles import (
    FAR,
    GROUP,
    Queries,
    Scores,
    accumulator,
    added,
    fill,
    load,
    logits,
    product,
    ring,
    slot_of,
    zeros,
)
from swathe.kernels.core.gluon import (
    box_bytes,
    gl,
    jit,
    mbarrier,
    mbarriers,
    sync_warpgroups,
    tma_load,
    tma_store_wait,
    warpgroup_mma_wait,
)

_ROWS = gl.constexpr(128)  # of a row tile of `backward_q`


class Call(NamedTuple):
    """What a call has besides tiles: pointers (None if not given), strides, sizes and numbers."""

    places: Any
    alibi: Any
    place_b: Any
    alibi_b: Any
    T: Any
    H: Any
    shift: Any
    scale: Any
    softcap: Any


class Turns(NamedTuple):
    """The query tiles of one key tile: of `groups` heads from h on, rows from begin to stop.

    All rows from whole_from to whole_to see all its keys.
    """

    start: Any
    g: Any
    b: Any
    h: Any
    groups: Any
    begin: Any
    stop: Any
    whole_from: Any
    whole_to: Any
    count: Any


class Rows(NamedTuple):
    """Slots of four numbers a row: lse2, delta, first and last; full when they are there."""

    stats: Any
    seen: Any
    full: Any


@jit
def _rows_that_reach(reach_ptr, whole_ptr, tiles, start, end):
    """Row tiles from the first to the last that see any key of [start, end), and those between
    which all see them whole.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    begin, stop, whole_from, whole_to = tiles, 0, tiles, tiles
    for block in range(0, tiles, 128):
        tile = block + gl.arange(0, 128, layout=LAYOUT)
        there, at = tile < tiles, 2 * tile
        lo = gl.load(reach_ptr + at, there, other=FAR)
        hi = gl.load(reach_ptr + at + 1, there, other=0)
        hit = (lo < end) & (hi > start)
        begin = gl.minimum(begin, gl.min(gl.where(hit, tile, tiles), 0))
        stop = gl.maximum(stop, gl.max(gl.where(hit, tile + 1, 0), 0))
        if whole_ptr is not None:
            lo = gl.load(whole_ptr + at, there, other=FAR)
            hi = gl.load(whole_ptr + at + 1, there, other=0)
            whole = (lo <= start) & (hi >= end)
            whole_from = gl.minimum(whole_from, gl.min(gl.where(whole, tile, tiles), 0))
            broken = (tile >= whole_from) & (whole == 0)
            whole_to = gl.minimum(whole_to, gl.min(gl.where(broken, tile, tiles), 0))
    return begin, gl.maximum(stop, begin), whole_from, whole_to


@jit
def _copy(
    k_at, v_at, q_at, do_at, stats_at, seen_at, k, v, q, do, rows, turns, H, TILES: gl.constexpr,
    BLOCK_T: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that copies: the keys and values of the warpgroups, then tiles of queries."""
    for i in gl.static_range(TILES):
        load(k, k_at, turns.b, turns.g, turns.start + i * GROUP, i)
        load(v, v_at, turns.b, turns.g, turns.start + i * GROUP, i)
    step = 0
    for i in range(turns.groups):
        h = turns.h + i
        for begin in range(turns.begin, turns.stop, BLOCK_T):
            fill(q, q_at, turns.b, h, begin, step, STAGES)
            # a slot of q that is empty was read whole, and so were its numbers
            slot, _ = slot_of(step, STAGES)
            full = rows.full.index(slot)
            mbarrier.expect(full, 2 * (box_bytes(stats_at) + box_bytes(seen_at)))
            for j in gl.static_range(2):
                at = 2 * (turns.b * H + h) + j
                tma_load(stats_at, [at, begin], full, rows.stats.index(2 * slot + j))
                tma_load(seen_at, [2 * turns.b + j, begin], full, rows.seen.index(2 * slot + j))
            fill(do, do_at, turns.b, h, begin, step, STAGES)
            step += 1


@jit
def _numbers(memory, slot, BLOCK_T: gl.constexpr):
    """One number of every row of a tile, beside keys."""
    LAYOUT: gl.constexpr = gl.SliceLayout(0, accumulator(BLOCK_T))
    return gl.expand_dims(memory.index(slot).reshape([BLOCK_T]).load(LAYOUT), 0)


@jit
def _keys(start, BLOCK_T: gl.constexpr):
    n = start + gl.arange(0, GROUP, layout=gl.SliceLayout(1, accumulator(BLOCK_T)))
    return gl.expand_dims(n, 1)


@jit
def _places(call, b, begin, BLOCK_T: gl.constexpr):
    """Key positions of a tile of rows, beside keys."""
    index = begin + gl.arange(0, BLOCK_T, layout=gl.SliceLayout(0, accumulator(BLOCK_T)))
    place = index + call.shift
    if call.places is not None:
        place = gl.load(call.places + b * call.place_b + index, index < call.T, other=0)
    return gl.expand_dims(place, 0)


@jit
def _weights(
    s, n, slot, begin, h, rows, turns, call, SCORED: gl.constexpr, SOFTCAP: gl.constexpr,
    BLOCK_T: gl.constexpr,
):  # fmt: skip
    """p^T of a tile of scores, and what becomes ds^T, as `weights` has them."""
    alibi, place = call.alibi, None
    if alibi is not None:
        alibi = gl.load(alibi + turns.b * call.alibi_b + h)
        place = _places(call, turns.b, begin, BLOCK_T)
    seeing = Queries(None, None, None, place)
    scores = Scores(call.scale, call.softcap, alibi)
    z, factor, t = logits(s, seeing, n, scores, SCORED, SOFTCAP, False)
    if (begin < turns.whole_from) | (begin >= turns.whole_to):
        first = _numbers(rows.seen, 2 * slot, BLOCK_T)
        last = _numbers(rows.seen, 2 * slot + 1, BLOCK_T)
        z = gl.where((n >= first) & (n < last), z, float("-inf"))
    return weights(z, factor, _numbers(rows.stats, 2 * slot, BLOCK_T), t, SOFTCAP)


@jit
def _done(acc, p, PENDING: gl.constexpr):
    """Sums whose products by p are done, PENDING later groups of products perhaps not."""
    if len(acc) == 1:
        first, p = warpgroup_mma_wait(PENDING, deps=[acc[0], p])
        return (first,)
    else:
        first, second, p = warpgroup_mma_wait(PENDING, deps=[acc[0], acc[1], p])
        return first, second


@jit
def _next(begin, h, turns, BLOCK_T: gl.constexpr):
    """The tile of queries after this one, maybe of the next head."""
    begin += BLOCK_T
    if begin >= turns.stop:
        begin, h = turns.begin, h + 1
    return begin, h


@jit
def _gather(
    INDEX: gl.constexpr, dk_at, dv_at, k, v, q, do, rows, turns, call, SCORED: gl.constexpr,
    SOFTCAP: gl.constexpr, BLOCK_T: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A warpgroup: dk and dv of its 64 keys."""
    start = turns.start + INDEX * GROUP
    n = _keys(start, BLOCK_T)
    dk, dv = zeros(k.memory), zeros(v.memory)
    mbarrier.wait(k.full.index(INDEX), 0)
    mbarrier.wait(v.full.index(INDEX), 0)
    begin, h = turns.begin, turns.h
    for step in range(turns.count):
        own = INDEX + (step >> 30)
        slot, full = slot_of(step, STAGES)
        mbarrier.wait(q.full.index(slot), full)
        s = product(k.memory, own, q.memory, slot)
        mbarrier.wait(do.full.index(slot), full)
        dp = product(v.memory, own, do.memory, slot)
        mbarrier.wait(rows.full.index(slot), full)
        s = warpgroup_mma_wait(len(v.memory), deps=[s])
        p, slope = _weights(s, n, slot, begin, h, rows, turns, call, SCORED, SOFTCAP, BLOCK_T)
        p = p.to(dv_at[0].dtype)
        dv = added(dv, p, do.memory, slot)
        delta = _numbers(rows.stats, 2 * slot + 1, BLOCK_T)
        dp = warpgroup_mma_wait(len(v.memory), deps=[dp])
        ds = (slope * (dp - delta)).to(dk_at[0].dtype)
        dk = added(dk, ds, q.memory, slot)
        dv = _done(dv, p, len(k.memory))
        mbarrier.arrive(do.empty.index(slot), count=1)
        dk = _done(dk, ds, 0)
        mbarrier.arrive(q.empty.index(slot), count=1)
        begin, h = _next(begin, h, turns, BLOCK_T)
    store(dk_at, k.memory, INDEX, times(dk, call.scale), turns.b, turns.g, start)
    store(dv_at, v.memory, INDEX, dv, turns.b, turns.g, start)
    tma_store_wait(0)


@jit
def _gather_v(
    dv_at, k, v, q, do, rows, turns, call, SCORED: gl.constexpr, SOFTCAP: gl.constexpr,
    BLOCK_T: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A warpgroup of two that share 64 keys: dv. Scores of the next tile run beside exp."""
    n, dv = _keys(turns.start, BLOCK_T), zeros(v.memory)
    mbarrier.wait(k.full.index(0), 0)
    begin, h = turns.begin, turns.h
    s = gl.zeros([GROUP, BLOCK_T], gl.float32, accumulator(BLOCK_T))
    if turns.count > 0:
        mbarrier.wait(q.full.index(0), 0)
        s = warpgroup_mma_wait(0, deps=[product(k.memory, 0, q.memory, 0)])
    for step in range(turns.count):
        slot, full = slot_of(step, STAGES)
        # the last tile has none after it, and its own scores again
        ahead, full_ahead = slot_of(gl.minimum(step + 1, turns.count - 1), STAGES)
        mbarrier.wait(q.full.index(ahead), full_ahead)
        s_ahead = product(k.memory, step >> 30, q.memory, ahead)
        mbarrier.wait(rows.full.index(slot), full)
        p, _ = _weights(s, n, slot, begin, h, rows, turns, call, SCORED, SOFTCAP, BLOCK_T)
        mbarrier.wait(do.full.index(slot), full)
        p = p.to(dv_at[0].dtype)
        dv = added(dv, p, do.memory, slot)
        s = warpgroup_mma_wait(len(v.memory), deps=[s_ahead])
        dv = _done(dv, p, 0)
        mbarrier.arrive(do.empty.index(slot), count=1)
        mbarrier.arrive(q.empty.index(slot), count=1)
        begin, h = _next(begin, h, turns, BLOCK_T)
    sync_warpgroups(8, 256)
    store(dv_at, v.memory, 0, dv, turns.b, turns.g, turns.start)
    tma_store_wait(0)


@jit
def _gather_k(
    dk_at, k, v, q, do, rows, turns, call, SCORED: gl.constexpr, SOFTCAP: gl.constexpr,
    BLOCK_T: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A warpgroup of two that share 64 keys: dk."""
    n, dk = _keys(turns.start, BLOCK_T), zeros(k.memory)
    mbarrier.wait(k.full.index(0), 0)
    mbarrier.wait(v.full.index(0), 0)
    begin, h = turns.begin, turns.h
    for step in range(turns.count):
        slot, full = slot_of(step, STAGES)
        mbarrier.wait(q.full.index(slot), full)
        s = product(k.memory, step >> 30, q.memory, slot)
        mbarrier.wait(do.full.index(slot), full)
        dp = product(v.memory, step >> 30, do.memory, slot)
        mbarrier.wait(rows.full.index(slot), full)
        s = warpgroup_mma_wait(len(v.memory), deps=[s])
        _, slope = _weights(s, n, slot, begin, h, rows, turns, call, SCORED, SOFTCAP, BLOCK_T)
        delta = _numbers(rows.stats, 2 * slot + 1, BLOCK_T)
        ahead, full_ahead = slot_of(step + 1, STAGES)
        mbarrier.wait(q.full.index(ahead), full_ahead, pred=step + 1 < turns.count)
        dp, slope = warpgroup_mma_wait(0, deps=[dp, slope])
        mbarrier.arrive(do.empty.index(slot), count=1)
        ds = (slope * (dp - delta)).to(dk_at[0].dtype)
        dk = _done(added(dk, ds, q.memory, slot), ds, 0)
        mbarrier.arrive(q.empty.index(slot), count=1)
        begin, h = _next(begin, h, turns, BLOCK_T)
    sync_warpgroups(8, 256)
    store(dk_at, k.memory, 0, times(dk, call.scale), turns.b, turns.g, turns.start)
    tma_store_wait(0)


PLAIN = ["T", "S", "H", "groups", "shift", "scale", "softcap"]


@jit(do_not_specialize=PLAIN)
def backward_kv(
    reach_ptr, whole_ptr, places_ptr, alibi_ptr, stats_at, seen_at, k0, k1, v0, v1, q0, q1, do0,
    do1, dk0, dk1, dv0, dv1, place_b, alibi_b, T, S, H, groups, shift, scale, softcap,
    SCORED: gl.constexpr, SOFTCAP: gl.constexpr, BLOCK_T: gl.constexpr, STAGES: gl.constexpr,
    SHARED: gl.constexpr, REGISTERS: gl.constexpr, LEAST: gl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys of one head, over the queries of its whole group."""
    TILES: gl.constexpr = 1 if SHARED else 2
    BLOCK_S: gl.constexpr = TILES * GROUP
    blocks, heads, tiles = gl.cdiv(S, BLOCK_S), H // groups, gl.cdiv(T, _ROWS)
    start = gl.program_id(0) % blocks * BLOCK_S
    g, b = gl.program_id(0) // blocks % heads, gl.program_id(0) // blocks // heads
    if whole_ptr is not None:
        whole_ptr += b * tiles * 2
    begin, stop, whole_from, whole_to = _rows_that_reach(
        reach_ptr + b * tiles * 2, whole_ptr, tiles, start, start + BLOCK_S
    )
    turns = Turns(
        start, g, b, g * groups, groups, begin * _ROWS, stop * _ROWS, whole_from * _ROWS,
        whole_to * _ROWS, (stop - begin) * (_ROWS // BLOCK_T) * groups,
    )  # fmt: skip
    call = Call(places_ptr, alibi_ptr, place_b, alibi_b, T, H, shift, scale, softcap)
    k_at, v_at, q_at, do_at, dk_at, dv_at = (k0,), (v0,), (q0,), (do0,), (dk0,), (dv0,)
    if k1 is not None:
        k_at, q_at, dk_at = (k0, k1), (q0, q1), (dk0, dk1)
    if v1 is not None:
        v_at, do_at, dv_at = (v0, v1), (do0, do1), (dv0, dv1)
    k, v = ring(k_at, TILES, 1), ring(v_at, TILES, 1)
    q, do = ring(q_at, STAGES, 2), ring(do_at, STAGES, 2)
    rows = Rows(
        gl.allocate_shared_memory(gl.float32, [2 * STAGES, 1, BLOCK_T], stats_at.layout),
        gl.allocate_shared_memory(gl.int32, [2 * STAGES, 1, BLOCK_T], seen_at.layout),
        mbarriers(STAGES),
    )
    for i in gl.static_range(STAGES):
        mbarrier.init(rows.full.index(i), count=1)
    if SHARED:
        gl.warp_specialize([
            (_gather_v, (dv_at, k, v, q, do, rows, turns, call, SCORED, SOFTCAP, BLOCK_T, STAGES)),
            (_gather_k, (dk_at, k, v, q, do, rows, turns, call, SCORED, SOFTCAP, BLOCK_T, STAGES)),
            (_copy, (k_at, v_at, q_at, do_at, stats_at, seen_at, k, v, q, do, rows, turns, H, TILES, BLOCK_T, STAGES)),
        ], [4, 1], [REGISTERS, LEAST])  # fmt: skip
    else:
        gl.warp_specialize([
            (_gather, (0, dk_at, dv_at, k, v, q, do, rows, turns, call, SCORED, SOFTCAP, BLOCK_T, STAGES)),
            (_gather, (1, dk_at, dv_at, k, v, q, do, rows, turns, call, SCORED, SOFTCAP, BLOCK_T, STAGES)),
            (_copy, (k_at, v_at, q_at, do_at, stats_at, seen_at, k, v, q, do, rows, turns, H, TILES, BLOCK_T, STAGES)),
        ], [4, 1], [REGISTERS, LEAST])  # fmt: skip
