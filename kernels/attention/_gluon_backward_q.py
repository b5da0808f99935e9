"""dq of attention for Hopper, and what the other backward kernel needs to know of rows.

    z = the scores of spec.py, times log2(e)      p = exp2(z - lse2)
    delta[t] = sum_d do[t, d] * o[t, d] - dlse[t]       ds = p * (do v^T - delta) * z'
    dq = scale * ds k

A program has 128 queries of one head, two warpgroups of 64, and goes over the keys that they see.
One more warp copies. Both products that a tile of keys begins with, q k^T and do v^T, are issued
at once, so that the exponentials run beside the second; ds goes from registers into the third.

Floor    6 T S D flops a head for D = E (full masks); k and v are read once for 128 queries.
Rounding scores, p, delta and sums are fp32; ds is rounded to k's dtype for its product, dq once at
         the end.
Stats    lse2 (inf where a row sees nothing), delta, what rows see, and which keys a tile reaches:
         those of _triton_backward.py, so that either's kernel for dk and dv can follow. `whole` are
         keys that all rows of a tile see, which lets that kernel go without masks there.
Source   Dao 2023, arXiv:2307.08691, algorithm 2, by rows; Shah et al. 2024, arXiv:2407.08608.
"""

# pyright: reportArgumentType=false
# mypy: disable-error-code="assignment"

from __future__ import annotations

from typing import Any, NamedTuple

from swathe.kernels.attention._gluon_backward_tiles import (
    LANES,
    PLAIN,
    ROUND,
    ROWS,
    anew,
    store,
    times,
    weights,
)
from swathe.kernels.attention._gluon_tiles import (
    GROUP,
    LOG2E,
    Bounds,
    Scores,
    accumulator,
    added,
    extents,
    fill,
    landed,
    load,
    logits,
    product,
    queries,
    ring,
    slot_of,
    zeros,
)
from swathe.kernels.core.gluon import (
    constexpr_function,
    gl,
    jit,
    mbarrier,
    tma_store_wait,
    warpgroup_mma_wait,
)

_FEATURES = gl.constexpr(64)  # of a pass over do and o
_WIDE = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


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


class Rings(NamedTuple):
    """Shared memory: rows of both warpgroups, and stages of tiles of keys and values."""

    q: Any
    do: Any
    k: Any
    v: Any


class Tile(NamedTuple):
    """A row tile: its first row, head, sequence; keys that any row sees, and that all see."""

    begin: Any
    h: Any
    b: Any
    lo: Any
    hi: Any
    whole_from: Any
    whole_to: Any


@jit
def tile_at(reach_ptr, whole_ptr, bounds, tile, h, b, T, S, BLOCK_S: gl.constexpr):
    """A row tile of a head, with the keys that it sees, from a multiple of BLOCK_S on.

    The first head leaves them for the kernel that goes over rows.
    """
    lo, hi, whole_from, whole_to = extents(bounds, tile * ROWS, T, S, ROWS, LANES)
    lo = gl.minimum(lo, hi) // BLOCK_S * BLOCK_S
    if h == 0:
        at = (b * gl.cdiv(T, ROWS) + tile) * 2
        gl.store(reach_ptr + at, lo)
        gl.store(reach_ptr + at + 1, hi)
        gl.store(whole_ptr + at, whole_from)
        gl.store(whole_ptr + at + 1, whole_to)
    return Tile(tile * ROWS, h, b, lo, hi, whole_from, whole_to)


@jit
def _copy(
    q_at, do_at, k_at, v_at, rings, tile, groups, BLOCK_S: gl.constexpr, K_STAGES: gl.constexpr,
    V_STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that copies: rows of both warpgroups, then tiles of keys and values."""
    for i in gl.static_range(2):
        load(rings.q, q_at, tile.b, tile.h, tile.begin + i * GROUP, i)
        load(rings.do, do_at, tile.b, tile.h, tile.begin + i * GROUP, i)
    g = tile.h // groups
    for step in range(gl.cdiv(tile.hi - tile.lo, BLOCK_S)):
        start = tile.lo + step * BLOCK_S
        fill(rings.k, k_at, tile.b, g, start, step, K_STAGES)
        fill(rings.v, v_at, tile.b, g, start, step, V_STAGES)


@jit
def _delta(call, tile, begin, PASSES: gl.constexpr):
    """The sum of do * o of every row, both read from where they lie in memory."""
    row = begin + gl.arange(0, GROUP, layout=gl.SliceLayout(1, _WIDE))
    live, wide = gl.expand_dims(row < call.T, 1), gl.expand_dims(row.to(gl.int64), 1)
    b, h = tile.b.to(gl.int64), tile.h.to(gl.int64)
    do = call.do + b * call.do_b + h * call.do_h + wide * call.do_t
    o = call.o + b * call.o_b + h * call.o_h + wide * call.o_t
    total = gl.zeros([GROUP], gl.float32, gl.SliceLayout(1, _WIDE))
    for i in gl.static_range(PASSES):
        feature = i * _FEATURES + gl.arange(0, _FEATURES, layout=gl.SliceLayout(0, _WIDE))
        feature = gl.expand_dims(feature, 0)
        there = live & (feature < call.E)
        arriving = gl.load(do + feature, there, other=0.0).to(gl.float32)
        total += gl.sum(arriving * gl.load(o + feature, there, other=0.0).to(gl.float32), 1)
    return total


@jit
def row_stats(call, tile, begin, rows, PASSES: gl.constexpr, LAYOUT: gl.constexpr):
    """lse2 and delta of a warpgroup's rows, stored with what they see.

    A row that sees nothing has no weight: its lse2 is inf, as is that of rows past the last.
    """
    head = (tile.b * call.H + tile.h).to(gl.int64)
    live = rows.index < call.T
    delta = gl.convert_layout(_delta(call, tile, begin, PASSES), LAYOUT)
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
        gl.store(seen, gl.convert_layout(gl.reshape(rows.first, [GROUP]), LAYOUT))
        gl.store(seen + span, gl.convert_layout(gl.reshape(rows.last, [GROUP]), LAYOUT))
    return gl.expand_dims(lse, 1), gl.expand_dims(delta, 1)


@jit
def _descend(
    INDEX: gl.constexpr, lse, delta, rings, tile, rows, scores, SCORED: gl.constexpr,
    SOFTCAP: gl.constexpr, BLOCK_S: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
):  # fmt: skip
    """dq without its scale of a warpgroup's rows, over the keys of their tile."""
    q, do, k, v = rings
    dtype: gl.constexpr = q.memory[0].dtype
    dq = zeros(q.memory)
    COLUMN: gl.constexpr = gl.SliceLayout(0, accumulator(BLOCK_S))
    tiles = gl.cdiv(tile.hi - tile.lo, BLOCK_S)
    for step in range(tiles):
        start = tile.lo + step * BLOCK_S
        own = anew(INDEX, step)
        at_k, full_k = slot_of(step, K_STAGES)
        at_v, full_v = slot_of(step, V_STAGES)
        mbarrier.wait(k.full.index(at_k), full_k)
        s = product(q.memory, own, k.memory, at_k)
        mbarrier.wait(v.full.index(at_v), full_v)
        dp = product(do.memory, own, v.memory, at_v)
        s = warpgroup_mma_wait(len(do.memory), deps=[s])
        n = gl.expand_dims(start + gl.arange(0, BLOCK_S, layout=COLUMN), 0)
        z, factor, t = logits(s, rows, n, scores, SCORED, SOFTCAP, False)
        if (start < tile.whole_from) | (start + BLOCK_S > tile.whole_to):
            z = gl.where((n >= rows.first) & (n < rows.last), z, float("-inf"))
        _, slope = weights(z, factor, lse, t, SOFTCAP)
        # a wait that loops: without one here, ptxas waits for dp before the exponentials
        ahead, full_ahead = slot_of(step + 1, K_STAGES)
        mbarrier.wait(k.full.index(ahead), full_ahead, pred=step + 1 < tiles)
        dp, slope = warpgroup_mma_wait(0, deps=[dp, slope])
        mbarrier.arrive(v.empty.index(at_v), count=1)
        ds = (slope * (dp - delta)).to(dtype)
        dq, _ = landed(added(dq, ds, k.memory, at_k), ds)
        mbarrier.arrive(k.empty.index(at_k), count=1)
    return dq


@jit
def _compute(
    INDEX: gl.constexpr, dq_at, rings, tile, call, SCORED: gl.constexpr, SOFTCAP: gl.constexpr,
    BLOCK_S: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, PASSES: gl.constexpr,
):  # fmt: skip
    """A warpgroup: dq of its 64 rows."""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, accumulator(BLOCK_S))
    alibi, places = call.alibi, call.places
    if alibi is not None:
        alibi = gl.load(alibi + tile.b * call.alibi_b + tile.h)
    if places is not None:
        places += tile.b * call.place_b
    scores = Scores(call.scale, call.softcap, alibi)
    bounds = Bounds(call.first, call.last, tile.b * call.bound_b, call.bound_t)
    begin = tile.begin + INDEX * GROUP
    rows = queries(bounds, places, begin, call.T, call.S, call.shift, 1, GROUP, LAYOUT)
    lse, delta = row_stats(call, tile, begin, rows, PASSES, LAYOUT)
    mbarrier.wait(rings.q.full.index(INDEX), 0)
    mbarrier.wait(rings.do.full.index(INDEX), 0)
    dq = _descend(
        INDEX, lse, delta, rings, tile, rows, scores, SCORED, SOFTCAP, BLOCK_S, K_STAGES, V_STAGES
    )
    store(dq_at, rings.q.memory, INDEX, times(dq, call.scale), tile.b, tile.h, begin)
    tma_store_wait(0)


@constexpr_function
def passes(boxes: Any) -> Any:
    """Passes over the features of the boxes of a head."""
    return -(-sum(box.block_shape[3] for box in boxes) // 64)


@jit(do_not_specialize=PLAIN)
def backward_q(
    do_ptr, dlse_ptr, o_ptr, lse_ptr, stats_ptr, seen_ptr, reach_ptr, whole_ptr, first_ptr,
    last_ptr, places_ptr, alibi_ptr, do0, do1, q0, q1, k0, k1, v0, v1, dq0, dq1, do_b, do_h, do_t,
    o_b, o_h, o_t, bound_b, bound_t, place_b, alibi_b, E, T, S, H, groups, shift, scale, softcap,
    SCORED: gl.constexpr, SOFTCAP: gl.constexpr, BLOCK_S: gl.constexpr, K_STAGES: gl.constexpr,
    V_STAGES: gl.constexpr, COMPUTE: gl.constexpr, COPY: gl.constexpr,
):  # fmt: skip
    """dq of one tile of 128 queries of one head; its rows' stats and reach on the way."""
    tiles, turn = gl.cdiv(T, ROWS), gl.program_id(0)
    # late tiles, which see more, first
    tile, h, b = tiles - 1 - turn % tiles, turn // tiles % H, turn // tiles // H
    bounds = Bounds(first_ptr, last_ptr, b * bound_b, bound_t)
    own = tile_at(reach_ptr, whole_ptr, bounds, tile, h, b, T, S, BLOCK_S)
    call = Call(
        do_ptr, dlse_ptr, o_ptr, lse_ptr, stats_ptr, seen_ptr, first_ptr, last_ptr, places_ptr,
        alibi_ptr, do_b, do_h, do_t, o_b, o_h, o_t, bound_b, bound_t, place_b, alibi_b, E, T, S, H,
        shift, scale, softcap,
    )  # fmt: skip
    q_at, k_at, dq_at, v_at, do_at = (q0,), (k0,), (dq0,), (v0,), (do0,)
    if q1 is not None:
        q_at, k_at, dq_at = (q0, q1), (k0, k1), (dq0, dq1)
    if v1 is not None:
        v_at, do_at = (v0, v1), (do0, do1)
    PASSES: gl.constexpr = passes(do_at)
    rings = Rings(
        ring(q_at, 2, 1), ring(do_at, 2, 1), ring(k_at, K_STAGES, 2), ring(v_at, V_STAGES, 2)
    )
    gl.warp_specialize(
        [
            (_compute, (0, dq_at, rings, own, call, SCORED, SOFTCAP, BLOCK_S, K_STAGES, V_STAGES,
                        PASSES)),
            (_compute, (1, dq_at, rings, own, call, SCORED, SOFTCAP, BLOCK_S, K_STAGES, V_STAGES,
                        PASSES)),
            (_copy, (q_at, do_at, k_at, v_at, rings, own, groups, BLOCK_S, K_STAGES, V_STAGES)),
        ],
        [4, 1],
        [COMPUTE, COPY],
    )  # fmt: skip
