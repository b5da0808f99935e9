"""The forward kernel of attention for Hopper."""

# pyright: reportArgumentType=false

from __future__ import annotations

from typing import Any, NamedTuple

from swathe.kernels.attention._gluon_tiles import (
    GROUP,
    Bounds,
    Scores,
    accumulator,
    added,
    fill,
    landed,
    load,
    memory_for,
    operand,
    place,
    product,
    queries,
    ring,
    scaled,
    settled,
    slot_of,
    start_of_softmax,
    stretches,
    tile_of,
    weigh,
    zeros,
)
from swathe.kernels.core.gluon import (
    fence_async_shared,
    gl,
    jit,
    mbarrier,
    mbarriers,
    partition_barrier,
    tma_store,
    tma_store_wait,
    warpgroup_mma_wait,
)

_LANES = gl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))  # of the warp that copies
_FIELDS = gl.constexpr(7)


class Call(NamedTuple):
    """What a call has besides heads: pointers (None if not given), sizes and numbers."""

    lse: Any
    first: Any
    last: Any
    places: Any
    sinks: Any
    alibi: Any
    bound_b: Any
    bound_t: Any
    place_b: Any
    alibi_b: Any
    T: Any
    S: Any
    H: Any
    groups: Any
    heads: Any
    section: Any
    shift: Any
    scale: Any
    softcap: Any


class Board(NamedTuple):
    """Where the copying warp writes what is next: numbers of one row tile, full and empty."""

    memory: Any
    full: Any
    empty: Any


class Order(NamedTuple):
    """One row tile: its first row (negative: no more), head, sequence, and stretches of keys."""

    begin: Any
    h: Any
    b: Any
    low: Any
    whole_from: Any
    whole_to: Any
    final: Any


@jit
def _announce(board, order, turn):
    mbarrier.wait(board.empty, (turn & 1) ^ 1)
    for i in gl.static_range(_FIELDS):
        board.memory.index(i).store(gl.full([1], 0, gl.int32, _LANES) + order[i])
    mbarrier.arrive(board.full, count=1)


@jit
def _read(board, turn):
    mbarrier.wait(board.full, turn & 1)
    order = Order(
        _number(board, 0), _number(board, 1), _number(board, 2), _number(board, 3),
        _number(board, 4), _number(board, 5), _number(board, 6),
    )  # fmt: skip
    mbarrier.arrive(board.empty, count=1)
    return order


@jit
def _number(board, i: gl.constexpr):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(board.memory.index(i).load(LAYOUT), 0)


@jit
def _copy(
    q_at, k_at, v_at, q, k, v, board, call, counter, BLOCK_S: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
):  # fmt: skip
    """The copying warp."""
    ROWS: gl.constexpr = CONSUMERS * GROUP
    tiles = gl.cdiv(call.T, ROWS)
    step, done, turn = 0, 0, gl.program_id(0)
    while turn < tiles * call.heads:
        ahead = gl.atomic_add(counter, 1) + gl.num_programs(0)
        tile, head = place(turn, tiles, call.heads, call.section)
        begin, b, h = tile * ROWS, head // call.H, head % call.H
        bounds = Bounds(call.first, call.last, b * call.bound_b, call.bound_t)
        low, whole_from, whole_to, final = stretches(
            bounds, begin, call.T, call.S, ROWS, BLOCK_S, _LANES
        )
        _announce(board, Order(begin, h, b, low, whole_from, whole_to, final), done)
        for i in gl.static_range(CONSUMERS):
            mbarrier.wait(q.empty.index(i), (done & 1) ^ 1)
            load(q, q_at, b, h, begin + i * GROUP, i)
        g = h // call.groups
        fill(k, k_at, b, g, final * BLOCK_S, step, STAGES)
        for i in range(final - low):
            fill(k, k_at, b, g, (final - i - 1) * BLOCK_S, step + 1, STAGES)
            fill(v, v_at, b, g, (final - i) * BLOCK_S, step, STAGES)
            step += 1
        fill(v, v_at, b, g, low * BLOCK_S, step, STAGES)
        step, done, turn = step + 1, done + 1, ahead
    _announce(board, Order(-1, 0, 0, 0, 0, 0, 0), done)


@jit
def _absorb(
    tile, stop, low, step, p, acc, total, peak, q, k, v, INDEX: gl.constexpr, rows, scores,
    SCORED: gl.constexpr, SOFTCAP: gl.constexpr, MASKED: gl.constexpr, BLOCK_S: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Absorb tiles of keys down to `stop`; p are the weights of the tile before, not yet in acc."""
    COLUMN: gl.constexpr = gl.SliceLayout(0, accumulator(BLOCK_S))
    while tile >= stop:
        slot, _ = slot_of(step, STAGES)
        before, full = slot_of(step - 1, STAGES)
        s = product(q.memory, INDEX, k.memory, slot)
        mbarrier.wait(v.full.index(before), full)
        ahead = added(acc, p, v.memory, before)
        s = warpgroup_mma_wait(len(acc), deps=[s])
        mbarrier.arrive(k.empty.index(slot), count=1)
        n = gl.expand_dims(tile * BLOCK_S + gl.arange(0, BLOCK_S, layout=COLUMN), 0)
        weights, shrink, total, peak = weigh(
            s, rows, n, scores, total, peak, SCORED, SOFTCAP, MASKED
        )
        p = _rounded(weights, v)
        # a wait that spins keeps the exponentials ahead of the wait for the product
        slot, full = slot_of(step + 1, STAGES)
        mbarrier.wait(k.full.index(slot), full, pred=tile > low)
        acc, p = landed(ahead, p)
        mbarrier.arrive(v.empty.index(before), count=1)
        acc = scaled(acc, shrink)
        step += 1
        tile -= 1
    return tile, step, p, acc, total, peak


@jit
def _rounded(weights, v):
    """Weights as the operand of a product with values."""
    p = weights.to(v.memory[0].dtype)
    return gl.convert_layout(p, operand(v.memory[0].shape[4]), assert_trivial=True)


@jit
def _attend(
    INDEX: gl.constexpr, order, step, done, q, k, v, call, SCORED: gl.constexpr,
    SOFTCAP: gl.constexpr, BLOCK_S: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """o before its division, total and peak of this warpgroup's rows, and the next step."""
    ROW: gl.constexpr = gl.SliceLayout(1, accumulator(BLOCK_S))
    COLUMN: gl.constexpr = gl.SliceLayout(0, accumulator(BLOCK_S))
    slope, places = call.alibi, call.places
    if slope is not None:
        slope = gl.load(slope + order.b * call.alibi_b + order.h)
    if places is not None:
        places += order.b * call.place_b
    scores = Scores(call.scale, call.softcap, slope)
    bounds = Bounds(call.first, call.last, order.b * call.bound_b, call.bound_t)
    begin = order.begin + INDEX * GROUP
    rows = queries(bounds, places, begin, call.T, call.S, call.shift, 1, GROUP, ROW)
    total, peak = start_of_softmax(call.sinks, order.h, ROW)
    acc = zeros(v.memory)
    mbarrier.wait(q.full.index(INDEX), done & 1)

    slot, full = slot_of(step, STAGES)
    mbarrier.wait(k.full.index(slot), full)
    s = warpgroup_mma_wait(0, deps=[product(q.memory, INDEX, k.memory, slot)])
    mbarrier.arrive(k.empty.index(slot), count=1)
    n = gl.expand_dims(order.final * BLOCK_S + gl.arange(0, BLOCK_S, layout=COLUMN), 0)
    weights, _, total, peak = weigh(s, rows, n, scores, total, peak, SCORED, SOFTCAP, True)
    p = _rounded(weights, v)
    slot, full = slot_of(step + 1, STAGES)
    mbarrier.wait(k.full.index(slot), full, pred=order.final > order.low)
    tile, step = order.final - 1, step + 1
    for part in gl.static_range(3):
        stop = order.whole_to if part == 0 else order.whole_from if part == 1 else order.low
        tile, step, p, acc, total, peak = _absorb(
            tile, gl.maximum(stop, order.low), order.low, step, p, acc, total, peak, q, k, v, INDEX,
            rows, scores, SCORED, SOFTCAP, part != 1, BLOCK_S, STAGES,
        )  # fmt: skip
    slot, full = slot_of(step - 1, STAGES)
    mbarrier.wait(v.full.index(slot), full)
    ahead = added(acc, p, v.memory, slot)
    share, lse = settled(total, peak)
    head = order.b * call.H + order.h
    gl.store(call.lse + head.to(gl.int64) * call.T + rows.index, lse, rows.index < call.T)
    acc, _ = landed(ahead, p)
    mbarrier.arrive(v.empty.index(slot), count=1)
    return scaled(acc, share), step


@jit
def _write(INDEX: gl.constexpr, o_at, room, order, acc):
    """Store o of this warpgroup's rows from its room in shared memory, which is free."""
    for i in gl.static_range(len(room)):
        tile_of(room[i], INDEX).store(acc[i].to(o_at[i].dtype))
    fence_async_shared()
    partition_barrier()
    tma_store(o_at[0], [order.b, order.h, order.begin + INDEX * GROUP, 0], room[0].index(INDEX))
    if len(room) == 2:
        second = o_at[0].block_shape[3]
        tma_store(
            o_at[1], [order.b, order.h, order.begin + INDEX * GROUP, second], room[1].index(INDEX)
        )


@jit
def _consume(
    INDEX: gl.constexpr, o_at, room, q, k, v, board, call, SCORED: gl.constexpr,
    SOFTCAP: gl.constexpr, BLOCK_S: gl.constexpr, STAGES: gl.constexpr, REUSE: gl.constexpr,
):  # fmt: skip
    """A warpgroup."""
    step, done = 0, 0
    order = _read(board, 0)
    while order.begin >= 0:
        acc, step = _attend(
            INDEX, order, step, done, q, k, v, call, SCORED, SOFTCAP, BLOCK_S, STAGES
        )
        if not REUSE:
            mbarrier.arrive(q.empty.index(INDEX), count=1)
            tma_store_wait(0)
            partition_barrier()
        _write(INDEX, o_at, room, order, acc)
        if REUSE:
            tma_store_wait(0)
            mbarrier.arrive(q.empty.index(INDEX), count=1)
        done += 1
        order = _read(board, done)
    tma_store_wait(0)


PLAIN = ["T", "S", "H", "groups", "heads", "section", "shift", "scale", "softcap"]


@jit(do_not_specialize=PLAIN)
def forward(
    lse_ptr, q0, q1, k0, k1, v0, v1, o0, o1, first_ptr, last_ptr, places_ptr, sinks_ptr, alibi_ptr,
    counter_ptr, bound_b, bound_t, place_b, alibi_b, T, S, H, groups, heads, section, shift, scale,
    softcap, SCORED: gl.constexpr, SOFTCAP: gl.constexpr, BLOCK_S: gl.constexpr,
    STAGES: gl.constexpr, CONSUMERS: gl.constexpr, REUSE: gl.constexpr, REGISTERS: gl.constexpr,
    LEAST: gl.constexpr,
):  # fmt: skip
    """o and lse2."""
    call = Call(
        lse_ptr, first_ptr, last_ptr, places_ptr, sinks_ptr, alibi_ptr, bound_b, bound_t, place_b,
        alibi_b, T, S, H, groups, heads, section, shift, scale, softcap,
    )  # fmt: skip
    q_at, k_at, v_at, o_at = (q0,), (k0,), (v0,), (o0,)
    if q1 is not None:
        q_at, k_at = (q0, q1), (k0, k1)
    if v1 is not None:
        v_at, o_at = (v0, v1), (o0, o1)
    q = ring(q_at, CONSUMERS, 1)
    k, v = ring(k_at, STAGES, CONSUMERS), ring(v_at, STAGES, CONSUMERS)
    room = q.memory
    if not REUSE:
        room = memory_for(o_at, CONSUMERS)
    board = Board(
        gl.allocate_shared_memory(gl.int32, [_FIELDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        mbarriers(1).index(0),
        mbarriers(1).index(0),
    )
    mbarrier.init(board.full, count=1)
    mbarrier.init(board.empty, count=CONSUMERS)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (0, o_at, room, q, k, v, board, call, SCORED, SOFTCAP, BLOCK_S, STAGES, REUSE)),
                (_consume, (1, o_at, room, q, k, v, board, call, SCORED, SOFTCAP, BLOCK_S, STAGES, REUSE)),
                (_copy, (q_at, k_at, v_at, q, k, v, board, call, counter_ptr, BLOCK_S, STAGES, CONSUMERS)),
            ],
            [4, 1],
            [REGISTERS, LEAST],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (0, o_at, room, q, k, v, board, call, SCORED, SOFTCAP, BLOCK_S, STAGES, REUSE)),
                (_consume, (1, o_at, room, q, k, v, board, call, SCORED, SOFTCAP, BLOCK_S, STAGES, REUSE)),
                (_consume, (2, o_at, room, q, k, v, board, call, SCORED, SOFTCAP, BLOCK_S, STAGES, REUSE)),
                (_copy, (q_at, k_at, v_at, q, k, v, board, call, counter_ptr, BLOCK_S, STAGES, CONSUMERS)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, LEAST],
        )
