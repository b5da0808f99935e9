"""dk and dv of attention on Hopper."""

# pyright: reportArgumentType=false

from __future__ import annotations

from typing import Any, NamedTuple

from swathe.kernels.core.gluon import (
    box_bytes,
    constexpr_function,
    fence_async_shared,
    gl,
    jit,
    mbarrier,
    mbarriers,
    partition_barrier,
    reinterpret,
    tma_load,
    tma_store,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)

KEYS = gl.constexpr(64)  # of one warpgroup
FAR = gl.constexpr(2**30)
LOG2E = gl.constexpr(1.4426950408889634)


class Ring(NamedTuple):
    q: Any
    do: Any
    stats: Any
    seen: Any
    q_full: Any
    q_empty: Any
    do_full: Any
    do_empty: Any


class Turns(NamedTuple):
    """Which tiles of queries a program visits: begin to stop of `groups` heads from `h` on."""

    b: Any
    H: Any
    h: Any
    groups: Any
    begin: Any
    stop: Any
    whole_from: Any
    whole_to: Any


class Scores(NamedTuple):
    scale: Any
    softcap: Any
    alibi: Any
    places: Any
    shift: Any
    T: Any


@constexpr_function
def fragment(columns):
    """Layout of a product of 64 rows, one warpgroup's."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@jit
def _produce(
    k, v, q, do, stats, seen, k_memory, v_memory, kv_full, ring, turns, g, start, QUERIES: gl.constexpr,
    STAGES: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    for i in gl.static_range(TILES):
        mbarrier.expect(kv_full.index(i), box_bytes(k) + box_bytes(v))
        tma_load(k, [turns.b, g, start + i * KEYS, 0], kv_full.index(i), k_memory.index(i))
        tma_load(v, [turns.b, g, start + i * KEYS, 0], kv_full.index(i), v_memory.index(i))
    turn = 0
    for i in range(turns.groups):
        h = turns.h + i
        for begin in range(turns.begin, turns.stop, QUERIES):
            slot, phase = turn % STAGES, turn // STAGES & 1
            full = ring.q_full.index(slot)
            mbarrier.wait(ring.q_empty.index(slot), phase ^ 1)
            mbarrier.expect(full, box_bytes(q) + 2 * (box_bytes(stats) + box_bytes(seen)))
            tma_load(q, [turns.b, h, begin, 0], full, ring.q.index(slot))
            for j in gl.static_range(2):
                row = 2 * (turns.b * turns.H + h) + j
                tma_load(stats, [row, begin], full, ring.stats.index(2 * slot + j))
                tma_load(seen, [2 * turns.b + j, begin], full, ring.seen.index(2 * slot + j))
            full = ring.do_full.index(slot)
            mbarrier.wait(ring.do_empty.index(slot), phase ^ 1)
            mbarrier.expect(full, box_bytes(do))
            tma_load(do, [turns.b, h, begin, 0], full, ring.do.index(slot))
            turn += 1


@jit
def _columns(memory, OF_S: gl.constexpr):
    row = memory.reshape([memory.shape[1]]).load(gl.SliceLayout(0, OF_S))
    return gl.expand_dims(row, 0)


@jit
def _consume(
    i: gl.constexpr, dk_to, dv_to, k_memory, v_memory, kv_full, ring, turns, g, start, S, scores, SCORED: gl.constexpr,
    SOFTCAP: gl.constexpr, QUERIES: gl.constexpr, D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    OF_S: gl.constexpr = fragment(QUERIES)
    OF_D: gl.constexpr = fragment(D)
    OF_E: gl.constexpr = fragment(E)
    dtype: gl.constexpr = dk_to.dtype
    start += i * KEYS
    n = gl.expand_dims(start + gl.arange(0, KEYS, layout=gl.SliceLayout(1, OF_S)), 1)
    dk = gl.zeros([KEYS, D], gl.float32, OF_D)
    dv = gl.zeros([KEYS, E], gl.float32, OF_E)
    none = gl.zeros([KEYS, QUERIES], gl.float32, OF_S)
    k = k_memory.index(i).reshape([KEYS, D])
    v = v_memory.index(i).reshape([KEYS, E])
    mbarrier.wait(kv_full.index(i), 0)
    factor = scores.scale * LOG2E
    turn = 0
    begin = turns.begin
    while turn < turns.groups:
        slot, phase = turn % STAGES, turn // STAGES & 1
        q = ring.q.index(slot).reshape([QUERIES, D])
        do = ring.do.index(slot).reshape([QUERIES, E])
        mbarrier.wait(ring.q_full.index(slot), phase)
        s = warpgroup_mma(k, q.permute([1, 0]), none, use_acc=False, is_async=True)
        lse = _columns(ring.stats.index(2 * slot), OF_S)
        mbarrier.wait(ring.do_full.index(slot), phase)
        s = warpgroup_mma_wait(0, deps=[s])
        dp = warpgroup_mma(v, do.permute([1, 0]), none, use_acc=False, is_async=True)
        if begin < turns.whole_from or begin >= turns.whole_to:
            first = _columns(ring.seen.index(2 * slot), OF_S)
            last = _columns(ring.seen.index(2 * slot + 1), OF_S)
            s = gl.where((n >= first) & (n < last), s, float("-inf"))
        p = gl.exp2(s * factor - lse)
        of_p = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, OF_E, 2))
        dv = warpgroup_mma(of_p, do, dv, is_async=True)
        delta = _columns(ring.stats.index(2 * slot + 1), OF_S)
        dp = warpgroup_mma_wait(1, deps=[dp])
        ds = p * (dp - delta)
        of_ds = gl.convert_layout(ds.to(dtype), gl.DotOperandLayout(0, OF_D, 2))
        dk = warpgroup_mma(of_ds, q, dk, is_async=True)
        dv = warpgroup_mma_wait(1, deps=[dv])
        mbarrier.arrive(ring.do_empty.index(slot), count=1)
        dk = warpgroup_mma_wait(0, deps=[dk])
        mbarrier.arrive(ring.q_empty.index(slot), count=1)
        turn += 1
        begin += QUERIES
        begin = gl.where(begin < turns.stop, begin, turns.begin)
    k = reinterpret(k, dtype, [1, 1, KEYS, D], dk_to.layout)
    v = reinterpret(v, dtype, [1, 1, KEYS, E], dv_to.layout)
    partition_barrier()
    k.store(gl.reshape((dk * scores.scale).to(dtype), [1, 1, KEYS, D]))
    v.store(gl.reshape(dv.to(dtype), [1, 1, KEYS, E]))
    fence_async_shared()
    partition_barrier()
    tma_store(dk_to, [turns.b, g, start, 0], k)
    tma_store(dv_to, [turns.b, g, start, 0], v)
    tma_store_wait(0)


@jit
def backward_kv(
    reach_ptr, k, v, q, do, stats, seen, dk, dv, alibi_ptr, T, S, H, groups, scale, softcap,
    SCORED: gl.constexpr, SOFTCAP: gl.constexpr, QUERIES: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    D: gl.constexpr = k.block_shape[3]
    E: gl.constexpr = v.block_shape[3]
    heads = H // groups
    blocks = gl.cdiv(S, 2 * KEYS)
    start = gl.program_id(0) % blocks * (2 * KEYS)
    g = gl.program_id(0) // blocks % heads
    b = gl.program_id(0) // blocks // heads
    begin = gl.load(reach_ptr)
    stop = gl.load(reach_ptr + 1)
    turns = Turns(b, H, g * groups, groups * (stop - begin) // QUERIES, begin, stop, gl.load(reach_ptr + 2), gl.load(reach_ptr + 3))
    scores = Scores(scale, softcap, alibi_ptr, None, 0, T)
    k_memory = gl.allocate_shared_memory(k.dtype, [2, 1, 1, KEYS, D], k.layout)
    v_memory = gl.allocate_shared_memory(k.dtype, [2, 1, 1, KEYS, E], v.layout)
    kv_full = mbarriers(2)
    ring = Ring(
        gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, QUERIES, D], q.layout),
        gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, QUERIES, E], do.layout),
        gl.allocate_shared_memory(gl.float32, [2 * STAGES, 1, QUERIES], stats.layout),
        gl.allocate_shared_memory(gl.int32, [2 * STAGES, 1, QUERIES], seen.layout),
        mbarriers(STAGES), mbarriers(STAGES), mbarriers(STAGES), mbarriers(STAGES),
    )  # fmt: skip
    for i in gl.static_range(2):
        mbarrier.init(kv_full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(ring.q_full.index(i), count=1)
        mbarrier.init(ring.do_full.index(i), count=1)
        mbarrier.init(ring.q_empty.index(i), count=2)
        mbarrier.init(ring.do_empty.index(i), count=2)
    gl.warp_specialize([
        (_consume, (0, dk, dv, k_memory, v_memory, kv_full, ring, turns, g, start, S, scores, SCORED, SOFTCAP, QUERIES, D, E, STAGES)),
        (_consume, (1, dk, dv, k_memory, v_memory, kv_full, ring, turns, g, start, S, scores, SCORED, SOFTCAP, QUERIES, D, E, STAGES)),
        (_produce, (k, v, q, do, stats, seen, k_memory, v_memory, kv_full, ring, turns, g, start, QUERIES, STAGES, 2)),
    ], [4, 1], [REGISTERS, 24])  # fmt: skip
