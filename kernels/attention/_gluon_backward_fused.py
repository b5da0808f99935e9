"""dq, dk and dv of attention for Hopper in one pass over pairs of tiles, and what that pass reads.

    p = exp2(z - lse2)      ds = p * (do v^T - delta) * z'
    dv = p^T do             dk = scale * ds^T q              dq = scale * ds k

A program has 128 keys of one key head and goes over the queries that see any of them, as
`backward_kv` does; each of its two warpgroups has 64 of the keys. Both put ds^T into shared memory,
and each multiplies all 128 keys of it by one half of k's features: half of what these keys add to
dq. The TMA adds that to fp32 memory, which the launcher rounds once.

Floor       10 T S D flops a head for D = E and full masks; 4 T D bytes are added for 128 keys.
Rounding    scores, p, ds and sums are fp32; p and ds are rounded to do's and q's dtype for their
            products, dk and dv once at the end. dq is added up in fp32.
Order       dk and dv as `backward_kv`. Parts of dq are added in the order in which they come: its
            last bits differ from run to run.
Source      Dao 2023, arXiv:2307.08691, algorithm 2; Shah et al. 2024, arXiv:2407.08608.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# mypy: disable-error-code="assignment"

from __future__ import annotations

from typing import Any, NamedTuple

from swathe.kernels.attention._gluon_backward_kv import (
    Call,
    Rings,
    copy,
    following,
    keys_of,
    turns_of,
    weights_of,
)
from swathe.kernels.attention._gluon_backward_q import Call as OfRows
from swathe.kernels.attention._gluon_backward_q import row_stats, tile_at
from swathe.kernels.attention._gluon_backward_tiles import (
    PLAIN,
    ROWS,
    anew,
    done,
    numbers,
    rows_for,
    store,
    times,
)
from swathe.kernels.attention._gluon_tiles import (
    GROUP,
    Bounds,
    accumulator,
    added,
    product,
    queries,
    ring,
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
    sync_warpgroups,
    tma_add,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)

_BOTH = gl.constexpr(8)  # the named barrier of the two warpgroups
_TILE = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))


class Parts(NamedTuple):
    """Shared memory: ds^T of both warpgroups, for two steps, and what leaves for dq."""

    ds: Any
    dq: Any


@jit(do_not_specialize=["T", "S", "H"])
def backward_rows(
    do_ptr, dlse_ptr, o_ptr, lse_ptr, stats_ptr, seen_ptr, reach_ptr, whole_ptr, first_ptr,
    last_ptr, do_b, do_h, do_t, o_b, o_h, o_t, bound_b, bound_t, E, T, S, H, PASSES: gl.constexpr,
):  # fmt: skip
    """What `backward_q` leaves of 128 rows of a head, without their dq."""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, accumulator(GROUP))
    tiles, turn = gl.cdiv(T, ROWS), gl.program_id(0)
    tile, h, b = turn % tiles, turn // tiles % H, turn // tiles // H
    bounds = Bounds(first_ptr, last_ptr, b * bound_b, bound_t)
    own = tile_at(reach_ptr, whole_ptr, bounds, tile, h, b, T, S, 1)
    call = OfRows(
        do_ptr, dlse_ptr, o_ptr, lse_ptr, stats_ptr, seen_ptr, first_ptr, last_ptr, None, None,
        do_b, do_h, do_t, o_b, o_h, o_t, bound_b, bound_t, 0, 0, E, T, S, H, 0, 1.0, 0.0,
    )  # fmt: skip
    for i in gl.static_range(ROWS // GROUP):
        begin = own.begin + i * GROUP
        rows = queries(bounds, None, begin, T, S, 0, 1, GROUP, LAYOUT)
        row_stats(call, own, begin, rows, PASSES, LAYOUT)


@jit
def _part_of_dq(INDEX: gl.constexpr, ds, k, first, step):
    """Begin ds k over both warpgroups' keys, for one half of the features."""
    WIDTH: gl.constexpr = k[INDEX].shape[4]
    dq = gl.zeros([GROUP, WIDTH], gl.float32, accumulator(WIDTH))
    for i in gl.static_range(2):
        rows = ds.index(first + i).permute([1, 0])
        dq = warpgroup_mma(rows, tile_of(k[INDEX], anew(i, step)), dq, use_acc=i > 0, is_async=True)
    return dq


@jit
def _add(to, memory, INDEX: gl.constexpr, own, value, b, h, row):
    """Begin to add a warpgroup's part of dq, once its last one has left."""
    tma_store_wait(0)
    partition_barrier()
    tile_of(memory, own).store(value)
    fence_async_shared()
    partition_barrier()
    tma_add(to, [b, h, row, INDEX * to.block_shape[3]], memory.index(own))


@jit
def _gather(
    INDEX: gl.constexpr, dq_at, dk_at, dv_at, rings, parts, turns, call, SCORED: gl.constexpr,
    SOFTCAP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A warpgroup: dk and dv of its 64 keys, and half the features of what all 128 add to dq."""
    k, v, q, do, rows = rings
    dtype: gl.constexpr = k.memory[0].dtype
    start = turns.start + INDEX * GROUP
    n, dk, dv = keys_of(start, GROUP), zeros(k.memory), zeros(v.memory)
    mbarrier.wait(k.full.index(0), 0)
    mbarrier.wait(k.full.index(1), 0)
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
        p, slope = weights_of(s, n, slot, begin, h, rows, turns, call, SCORED, SOFTCAP, GROUP)
        p = p.to(dtype)
        dv = added(dv, p, do.memory, slot)
        dp = warpgroup_mma_wait(len(v.memory), deps=[dp])
        delta = numbers(rows.stats, 2 * slot + 1, GROUP)
        ds = (slope * (dp - delta)).to(dtype)
        # the other warpgroup read this half two steps ago, before it came to the last barrier
        half = 2 * (step % 2)
        parts.ds.index(half + INDEX).store(ds)
        fence_async_shared()
        sync_warpgroups(_BOTH, 256)
        dq = _part_of_dq(INDEX, parts.ds, k.memory, half, step)
        dk = added(dk, ds, q.memory, slot)
        dv = done(dv, p, 2 + len(k.memory))
        mbarrier.arrive(do.empty.index(slot), count=1)
        dq = warpgroup_mma_wait(len(k.memory), deps=[dq])
        _add(dq_at, parts.dq, INDEX, own, dq, turns.b, h, begin)
        dk = done(dk, ds, 0)
        mbarrier.arrive(q.empty.index(slot), count=1)
        begin, h = following(begin, h, turns, GROUP)
    # the other may still multiply by the keys that dk leaves through
    sync_warpgroups(_BOTH, 256)
    store(dk_at, k.memory, INDEX, times(dk, call.scale), turns.b, turns.g, start)
    store(dv_at, v.memory, INDEX, dv, turns.b, turns.g, start)
    tma_store_wait(0)


@jit(do_not_specialize=PLAIN)
def backward_fused(
    reach_ptr, whole_ptr, places_ptr, alibi_ptr, stats_at, seen_at, k0, k1, v0, q0, q1, do0, dq0,
    dk0, dk1, dv0, place_b, alibi_b, T, S, H, groups, shift, scale, softcap, SCORED: gl.constexpr,
    SOFTCAP: gl.constexpr, STAGES: gl.constexpr, COMPUTE: gl.constexpr, COPY: gl.constexpr,
):  # fmt: skip
    """dk and dv of 128 keys of one head over the queries of its group, and their part of dq.

    Boxes of k and q have half a head's features; v and do have one box.
    """
    turns = turns_of(reach_ptr, whole_ptr, T, S, H, groups, 2 * GROUP, GROUP)
    call = Call(places_ptr, alibi_ptr, place_b, alibi_b, T, H, shift, scale, softcap)
    k_at, q_at, dk_at, v_at, do_at, dv_at = (k0, k1), (q0, q1), (dk0, dk1), (v0,), (do0,), (dv0,)
    rings = Rings(
        ring(k_at, 2, 1), ring(v_at, 2, 1), ring(q_at, STAGES, 2), ring(do_at, STAGES, 2),
        rows_for(stats_at, seen_at, GROUP, STAGES),
    )  # fmt: skip
    SHAPE: gl.constexpr = dq0.block_shape
    parts = Parts(
        gl.allocate_shared_memory(k0.dtype, [4, GROUP, GROUP], _TILE),
        gl.allocate_shared_memory(gl.float32, [2, 1, 1, SHAPE[2], SHAPE[3]], dq0.layout),
    )
    gl.warp_specialize(
        [
            (_gather, (0, dq0, dk_at, dv_at, rings, parts, turns, call, SCORED, SOFTCAP, STAGES)),
            (_gather, (1, dq0, dk_at, dv_at, rings, parts, turns, call, SCORED, SOFTCAP, STAGES)),
            (copy, (k_at, v_at, q_at, do_at, stats_at, seen_at, rings, turns, H, 2, GROUP,
                    STAGES)),
        ],
        [4, 1],
        [COMPUTE, COPY],
    )  # fmt: skip
