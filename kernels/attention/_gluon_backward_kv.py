"""dk and dv of attention for Hopper.

    p = exp2(z - lse2)      ds = p * (do v^T - delta) * z'      dv = p^T do      dk = scale * ds^T q

A program has a tile of keys of one key head and goes over the queries that see any of them, head
by head of its group. Tiles are transposed (keys, queries), so that p^T and ds^T go from registers
into the products they are left operands of. lse2, delta and what rows see come with q's tiles by
copies of their own. k q^T and v do^T are issued at once; exponentials run beside the second, and
what becomes ds beside the product for dv.

Warpgroups  two, of 64 keys each; where sums of wide heads leave no registers, two of the same 64
            keys: one for dv and one for dk, which both find p.
Floor       8 T S D flops a head for D = E and full masks, 10 where warpgroups share keys; q and do
            are read once for 128 keys, or 64.
Rounding    scores, p, ds and sums are fp32; p and ds are rounded to do's and q's dtype for their
            products, dk and dv once at the end.
Order       rows, then heads of the group, both ascending: no atomics, bit-equal reruns.
Source      Dao 2023, arXiv:2307.08691, algorithm 2; Shah et al. 2024, arXiv:2407.08608.
"""

# pyright: reportArgumentType=false
# mypy: disable-error-code="assignment"

from __future__ import annotations

from typing import Any, NamedTuple

from swathe.kernels.attention._gluon_backward_tiles import (
    LANES,
    PLAIN,
    ROWS,
    anew,
    done,
    load_rows,
    numbers,
    rows_for,
    store,
    times,
    weights,
)
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
    gl,
    jit,
    mbarrier,
    sync_warpgroups,
    tma_store_wait,
    warpgroup_mma_wait,
)

_ENOUGH = gl.constexpr(8)  # the named barrier of two warpgroups that share keys


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
    """A tile of keys, from `start` on of head g, and its `count` tiles of queries.

    They are rows from begin to stop of `groups` heads from h on; those from whole_from to whole_to
    see all its keys.
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


class Rings(NamedTuple):
    """Shared memory: keys and values of the warpgroups, and stages of tiles of queries."""

    k: Any
    v: Any
    q: Any
    do: Any
    rows: Any


@jit
def _rows_that_reach(reach_ptr, whole_ptr, tiles, start, end):
    """Row tiles from the first to the last that see any key of [start, end), and from the first
    that sees all of them on those that do so without a gap.
    """
    begin, stop, whole_from, whole_to = tiles, 0, tiles, tiles
    for block in range(0, tiles, 128):
        tile = block + gl.arange(0, 128, layout=LANES)
        there, at = tile < tiles, 2 * tile
        low = gl.load(reach_ptr + at, there, other=FAR)
        high = gl.load(reach_ptr + at + 1, there, other=0)
        hit = (low < end) & (high > start)
        begin = gl.minimum(begin, gl.min(gl.where(hit, tile, tiles), 0))
        stop = gl.maximum(stop, gl.max(gl.where(hit, tile + 1, 0), 0))
        if whole_ptr is not None:
            low = gl.load(whole_ptr + at, there, other=FAR)
            high = gl.load(whole_ptr + at + 1, there, other=0)
            whole = (low <= start) & (high >= end)
            whole_from = gl.minimum(whole_from, gl.min(gl.where(whole, tile, tiles), 0))
            broken = (tile >= whole_from) & ((low > start) | (high < end))
            whole_to = gl.minimum(whole_to, gl.min(gl.where(broken, tile, tiles), 0))
    return begin, gl.maximum(stop, begin), whole_from, whole_to


@jit
def turns_of(
    reach_ptr, whole_ptr, T, S, H, groups, BLOCK_S: gl.constexpr, BLOCK_T: gl.constexpr
):  # fmt: skip
    """The tile of keys of this program, and what it goes over."""
    blocks, heads, tiles = gl.cdiv(S, BLOCK_S), H // groups, gl.cdiv(T, ROWS)
    start = gl.program_id(0) % blocks * BLOCK_S
    g, b = gl.program_id(0) // blocks % heads, gl.program_id(0) // blocks // heads
    if whole_ptr is not None:
        whole_ptr += b * tiles * 2
    begin, stop, whole_from, whole_to = _rows_that_reach(
        reach_ptr + b * tiles * 2, whole_ptr, tiles, start, start + BLOCK_S
    )
    return Turns(
        start, g, b, g * groups, groups, begin * ROWS, stop * ROWS, whole_from * ROWS,
        whole_to * ROWS, (stop - begin) * (ROWS // BLOCK_T) * groups,
    )  # fmt: skip


@jit
def copy(
    k_at, v_at, q_at, do_at, stats_at, seen_at, rings, turns, H, TILES: gl.constexpr,
    BLOCK_T: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that copies: keys and values of the warpgroups, then tiles of queries."""
    for i in gl.static_range(TILES):
        load(rings.k, k_at, turns.b, turns.g, turns.start + i * GROUP, i)
        load(rings.v, v_at, turns.b, turns.g, turns.start + i * GROUP, i)
    step = 0
    for i in range(turns.groups):
        h = turns.h + i
        for begin in range(turns.begin, turns.stop, BLOCK_T):
            fill(rings.q, q_at, turns.b, h, begin, step, STAGES)
            load_rows(rings.rows, stats_at, seen_at, turns.b * H + h, turns.b, begin, step, STAGES)
            fill(rings.do, do_at, turns.b, h, begin, step, STAGES)
            step += 1


@jit
def keys_of(start, BLOCK_T: gl.constexpr):
    """A warpgroup's keys, beside queries."""
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
def weights_of(
    s, n, slot, begin, h, rows, turns, call, SCORED: gl.constexpr, SOFTCAP: gl.constexpr,
    BLOCK_T: gl.constexpr,
):  # fmt: skip
    """p^T of a tile of scores, and what becomes ds^T, as `weights` has them."""
    alibi, place = call.alibi, None
    if alibi is not None:
        alibi = gl.load(alibi + turns.b * call.alibi_b + h)
        place = _places(call, turns.b, begin, BLOCK_T)
    scores = Scores(call.scale, call.softcap, alibi)
    seeing = Queries(None, None, None, place)
    z, factor, t = logits(s, seeing, n, scores, SCORED, SOFTCAP, False)
    if (begin < turns.whole_from) | (begin >= turns.whole_to):
        first = numbers(rows.seen, 2 * slot, BLOCK_T)
        last = numbers(rows.seen, 2 * slot + 1, BLOCK_T)
        z = gl.where((n >= first) & (n < last), z, float("-inf"))
    return weights(z, factor, numbers(rows.stats, 2 * slot, BLOCK_T), t, SOFTCAP)


@jit
def following(begin, h, turns, BLOCK_T: gl.constexpr):
    """The tile of queries after this one, maybe of the next head."""
    begin += BLOCK_T
    if begin >= turns.stop:
        begin, h = turns.begin, h + 1
    return begin, h


@jit
def _gather(
    INDEX: gl.constexpr, dk_at, dv_at, rings, turns, call, SCORED: gl.constexpr,
    SOFTCAP: gl.constexpr, BLOCK_T: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A warpgroup: dk and dv of its 64 keys."""
    k, v, q, do, rows = rings
    dtype: gl.constexpr = k.memory[0].dtype
    start = turns.start + INDEX * GROUP
    n, dk, dv = keys_of(start, BLOCK_T), zeros(k.memory), zeros(v.memory)
    mbarrier.wait(k.full.index(INDEX), 0)
    mbarrier.wait(v.full.index(INDEX), 0)
    begin, h = turns.begin, turns.h
    for step in range(turns.count):
        own = anew(INDEX, step)
        slot, full = slot_of(step, STAGES)
        mbarrier.wait(q.full.index(slot), full)
        s = product(k.memory, own, q.memory, slot)
        mbarrier.wait(do.full.index(slot), full)
        dp = product(v.memory, own, do.memory, slot)
        mbarrier.wait(rows.full.index(slot), full)
        s = warpgroup_mma_wait(len(v.memory), deps=[s])
        p, slope = weights_of(s, n, slot, begin, h, rows, turns, call, SCORED, SOFTCAP, BLOCK_T)
        p = p.to(dtype)
        dv = added(dv, p, do.memory, slot)
        delta = numbers(rows.stats, 2 * slot + 1, BLOCK_T)
        dp = warpgroup_mma_wait(len(v.memory), deps=[dp])
        ds = (slope * (dp - delta)).to(dtype)
        dk = added(dk, ds, q.memory, slot)
        dv = done(dv, p, len(k.memory))
        mbarrier.arrive(do.empty.index(slot), count=1)
        dk = done(dk, ds, 0)
        mbarrier.arrive(q.empty.index(slot), count=1)
        begin, h = following(begin, h, turns, BLOCK_T)
    store(dk_at, k.memory, INDEX, times(dk, call.scale), turns.b, turns.g, start)
    store(dv_at, v.memory, INDEX, dv, turns.b, turns.g, start)
    tma_store_wait(0)


@jit
def _gather_v(
    dv_at, rings, turns, call, SCORED: gl.constexpr, SOFTCAP: gl.constexpr,
    BLOCK_T: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One of two warpgroups that share 64 keys: dv. Exponentials run beside the next scores."""
    k, v, q, do, rows = rings
    n, dv = keys_of(turns.start, BLOCK_T), zeros(v.memory)
    s = gl.zeros([GROUP, BLOCK_T], gl.float32, accumulator(BLOCK_T))
    begin, h = turns.begin, turns.h
    mbarrier.wait(k.full.index(0), 0)
    if turns.count > 0:
        mbarrier.wait(q.full.index(0), 0)
        s = warpgroup_mma_wait(0, deps=[product(k.memory, 0, q.memory, 0)])
    for step in range(turns.count):
        slot, full = slot_of(step, STAGES)
        # the last tile finds its own scores again, which nobody wants
        ahead, full_ahead = slot_of(gl.minimum(step + 1, turns.count - 1), STAGES)
        mbarrier.wait(q.full.index(ahead), full_ahead)
        s_ahead = product(k.memory, anew(0, step), q.memory, ahead)
        mbarrier.wait(rows.full.index(slot), full)
        p, _ = weights_of(s, n, slot, begin, h, rows, turns, call, SCORED, SOFTCAP, BLOCK_T)
        p = p.to(v.memory[0].dtype)
        mbarrier.wait(do.full.index(slot), full)
        dv = added(dv, p, do.memory, slot)
        s = warpgroup_mma_wait(len(v.memory), deps=[s_ahead])
        dv = done(dv, p, 0)
        mbarrier.arrive(do.empty.index(slot), count=1)
        mbarrier.arrive(q.empty.index(slot), count=1)
        begin, h = following(begin, h, turns, BLOCK_T)
    # the other still reads what dv leaves through
    sync_warpgroups(_ENOUGH, 256)
    store(dv_at, v.memory, 0, dv, turns.b, turns.g, turns.start)
    tma_store_wait(0)


@jit
def _gather_k(
    dk_at, rings, turns, call, SCORED: gl.constexpr, SOFTCAP: gl.constexpr,
    BLOCK_T: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The other of two warpgroups that share 64 keys: dk."""
    k, v, q, do, rows = rings
    n, dk = keys_of(turns.start, BLOCK_T), zeros(k.memory)
    mbarrier.wait(k.full.index(0), 0)
    mbarrier.wait(v.full.index(0), 0)
    begin, h = turns.begin, turns.h
    for step in range(turns.count):
        own = anew(0, step)
        slot, full = slot_of(step, STAGES)
        mbarrier.wait(q.full.index(slot), full)
        s = product(k.memory, own, q.memory, slot)
        mbarrier.wait(do.full.index(slot), full)
        dp = product(v.memory, own, do.memory, slot)
        mbarrier.wait(rows.full.index(slot), full)
        s = warpgroup_mma_wait(len(v.memory), deps=[s])
        _, slope = weights_of(s, n, slot, begin, h, rows, turns, call, SCORED, SOFTCAP, BLOCK_T)
        delta = numbers(rows.stats, 2 * slot + 1, BLOCK_T)
        # a wait that loops: without one here, ptxas waits for dp before the exponentials
        ahead, full_ahead = slot_of(step + 1, STAGES)
        mbarrier.wait(q.full.index(ahead), full_ahead, pred=step + 1 < turns.count)
        dp, slope = warpgroup_mma_wait(0, deps=[dp, slope])
        mbarrier.arrive(do.empty.index(slot), count=1)
        ds = (slope * (dp - delta)).to(k.memory[0].dtype)
        dk = done(added(dk, ds, q.memory, slot), ds, 0)
        mbarrier.arrive(q.empty.index(slot), count=1)
        begin, h = following(begin, h, turns, BLOCK_T)
    sync_warpgroups(_ENOUGH, 256)
    store(dk_at, k.memory, 0, times(dk, call.scale), turns.b, turns.g, turns.start)
    tma_store_wait(0)


@jit(do_not_specialize=PLAIN)
def backward_kv(
    reach_ptr, whole_ptr, places_ptr, alibi_ptr, stats_at, seen_at, k0, k1, v0, v1, q0, q1, do0,
    do1, dk0, dk1, dv0, dv1, place_b, alibi_b, T, S, H, groups, shift, scale, softcap,
    SCORED: gl.constexpr, SOFTCAP: gl.constexpr, BLOCK_T: gl.constexpr, STAGES: gl.constexpr,
    SHARED: gl.constexpr, COMPUTE: gl.constexpr, COPY: gl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys of one head, over the queries of its whole group.

    SHARED: the tile is of 64 keys and not of 128, and both warpgroups have all of them.
    """
    TILES: gl.constexpr = 1 if SHARED else 2
    turns = turns_of(reach_ptr, whole_ptr, T, S, H, groups, TILES * GROUP, BLOCK_T)
    call = Call(places_ptr, alibi_ptr, place_b, alibi_b, T, H, shift, scale, softcap)
    k_at, v_at, q_at, do_at, dk_at, dv_at = (k0,), (v0,), (q0,), (do0,), (dk0,), (dv0,)
    if k1 is not None:
        k_at, q_at, dk_at = (k0, k1), (q0, q1), (dk0, dk1)
    if v1 is not None:
        v_at, do_at, dv_at = (v0, v1), (do0, do1), (dv0, dv1)
    rings = Rings(
        ring(k_at, TILES, 1), ring(v_at, TILES, 1), ring(q_at, STAGES, 2), ring(do_at, STAGES, 2),
        rows_for(stats_at, seen_at, BLOCK_T, STAGES),
    )  # fmt: skip
    if SHARED:
        gl.warp_specialize(
            [
                (_gather_v, (dv_at, rings, turns, call, SCORED, SOFTCAP, BLOCK_T, STAGES)),
                (_gather_k, (dk_at, rings, turns, call, SCORED, SOFTCAP, BLOCK_T, STAGES)),
                (copy, (k_at, v_at, q_at, do_at, stats_at, seen_at, rings, turns, H, TILES,
                         BLOCK_T, STAGES)),
            ],
            [4, 1],
            [COMPUTE, COPY],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_gather, (0, dk_at, dv_at, rings, turns, call, SCORED, SOFTCAP, BLOCK_T, STAGES)),
                (_gather, (1, dk_at, dv_at, rings, turns, call, SCORED, SOFTCAP, BLOCK_T, STAGES)),
                (copy, (k_at, v_at, q_at, do_at, stats_at, seen_at, rings, turns, H, TILES,
                         BLOCK_T, STAGES)),
            ],
            [4, 1],
            [COMPUTE, COPY],
        )  # fmt: skip
