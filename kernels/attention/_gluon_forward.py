"""The forward kernel of attention for Hopper: one warp copies, two warpgroups compute.

A tile is 128 rows of one head, 64 for each warpgroup. The copying warp takes the next tile by a
counter, reads which keys its rows see, writes both on a board, and keeps rings of keys and values
filled; programs stay until no tile is left, so that copies for the next begin during this one. The
keys come from the last tile to the first: the first to be absorbed is the one that is masked.

Overlap   k q^T of a tile of keys and p v of the one before run while the exponentials are taken.
          Nothing in a program's text says so to the assembler, which moves the wait for p v ahead
          of the softmax unless something that spins stands between: the wait for the next keys.
Floors    4 T S D flops a head (half of it if causal) at 4096 a clock of a multiprocessor; one
          exponential a score at 16 a clock takes as long where D is 64, half as long at 128.
          q, k, v and o move once: T S / (T + S) flops a byte, while memory is the slower below
          some 200, so that flops bind from 400 rows and keys on. Tiles of 128 rows copy keys and
          values for 128 flops a byte: those must come from the L2 cache, hence the order of tiles.
Source    Shah et al. 2024, arXiv:2407.08608, sections 3.1 and 3.2.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# mypy: disable-error-code="assignment"

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
    shared,
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

ROWS = gl.constexpr(128)  # of a tile
_WARPGROUPS = gl.constexpr(2)
_COPYING = gl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))
_NUMBERS = gl.constexpr(7)


class Call(NamedTuple):
    """What a call has besides heads: pointers (None where not given), strides, sizes, numbers."""

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
    scale: Any
    softcap: Any


class Board(NamedTuple):
    """Where the copying warp writes an Order for both warpgroups, and its two mbarriers."""

    memory: Any
    full: Any
    empty: Any


class Order(NamedTuple):
    """A tile's first row (negative: no more tiles), head, sequence, and its key tiles.

    They are low to final; all rows see all keys from whole_from on and before whole_to.
    """

    begin: Any
    h: Any
    b: Any
    low: Any
    whole_from: Any
    whole_to: Any
    final: Any


class Work(NamedTuple):
    """Descriptors of o, rings of q (a slot a warpgroup), k and v, room for o, and the board."""

    o_at: Any
    q: Any
    k: Any
    v: Any
    room: Any
    board: Any


@jit
def _announce(board, order, turn):
    """Write an order once the last one was read."""
    mbarrier.wait(board.empty, (turn & 1) ^ 1)
    for i in gl.static_range(_NUMBERS):
        board.memory.index(i).store(gl.full([1], 0, gl.int32, _COPYING) + order[i])
    mbarrier.arrive(board.full, count=1)


@jit
def _read(board, turn):
    """The order of a turn, as soon as it is there."""
    mbarrier.wait(board.full, turn & 1)
    order = Order(
        _number(board, 0), _number(board, 1), _number(board, 2), _number(board, 3),
        _number(board, 4), _number(board, 5), _number(board, 6),
    )  # fmt: skip
    mbarrier.arrive(board.empty, count=1)
    return order


@jit
def _number(board, i: gl.constexpr):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(board.memory.index(i).load(LAYOUT), 0)


@jit
def _copy(q_at, k_at, v_at, work, call, counter, BLOCK_S: gl.constexpr, STAGES: gl.constexpr):
    """The copying warp's part."""
    q, k, v, board = work.q, work.k, work.v, work.board
    tiles = gl.cdiv(call.T, ROWS)
    step, done, turn = 0, 0, gl.program_id(0)
    while turn < tiles * call.heads:
        tile, head = place(turn, tiles, call.heads, call.section)
        begin, b, h = tile * ROWS, head // call.H, head % call.H
        bounds = Bounds(call.first, call.last, b * call.bound_b, call.bound_t)
        low, whole_from, whole_to, final = stretches(
            bounds, begin, call.T, call.S, ROWS, BLOCK_S, _COPYING
        )
        _announce(board, Order(begin, h, b, low, whole_from, whole_to, final), done)
        for i in gl.static_range(_WARPGROUPS):
            mbarrier.wait(q.empty.index(i), (done & 1) ^ 1)
            load(q, q_at, b, h, begin + i * GROUP, i)
        g = h // call.groups
        fill(k, k_at, b, g, final * BLOCK_S, step, STAGES)
        for i in range(final - low):
            # values are wanted one step after their keys
            fill(k, k_at, b, g, (final - i - 1) * BLOCK_S, step + 1, STAGES)
            fill(v, v_at, b, g, (final - i) * BLOCK_S, step, STAGES)
            step += 1
        # as late as its answer is there in time: who takes tiles early takes some from others
        following = gl.atomic_add(counter, 1) + gl.num_programs(0)
        fill(v, v_at, b, g, low * BLOCK_S, step, STAGES)
        step, done, turn = step + 1, done + 1, following
    _announce(board, Order(-1, 0, 0, 0, 0, 0, 0), done)


@jit
def softmax(
    s, tile, rows, scores, total, peak, v, SCORED: gl.constexpr, SOFTCAP: gl.constexpr,
    MASKED: gl.constexpr, BLOCK_S: gl.constexpr,
):  # fmt: skip
    """Weights of one tile of keys as the operand of their product with v, and `weigh`'s rest."""
    COLUMN: gl.constexpr = gl.SliceLayout(0, accumulator(BLOCK_S))
    n = gl.expand_dims(tile * BLOCK_S + gl.arange(0, BLOCK_S, layout=COLUMN), 0)
    p, shrink, total, peak = weigh(s, rows, n, scores, total, peak, SCORED, SOFTCAP, MASKED)
    p = p.to(v.memory[0].dtype)
    p = gl.convert_layout(p, operand(v.memory[0].shape[4]), assert_trivial=True)
    return p, shrink, total, peak


@jit
def _landed(acc, p, following):
    """Sums to which p's products were added, and weights that the wait may not run ahead of.

    p is named as well: until the wait, its registers may not be taken for anything else.
    """
    if len(acc) == 1:
        first, _, following = warpgroup_mma_wait(0, deps=[acc[0], p, following])
        return (first,), following
    else:
        first, second, _, following = warpgroup_mma_wait(0, deps=[acc[0], acc[1], p, following])
        return (first, second), following


@jit
def absorb(
    INDEX: gl.constexpr, work, tile, stop, low, step, p, acc, total, peak, rows, scores,
    SCORED: gl.constexpr, SOFTCAP: gl.constexpr, MASKED: gl.constexpr, BLOCK_S: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Absorb key tiles down to `stop`, the first of which is there; p weighs the tile before."""
    q, k, v = work.q, work.k, work.v
    while tile >= stop:
        slot, _ = slot_of(step, STAGES)
        before, full = slot_of(step - 1, STAGES)
        s = product(q.memory, INDEX, k.memory, slot)
        mbarrier.wait(v.full.index(before), full)
        ahead = added(acc, p, v.memory, before)
        s = warpgroup_mma_wait(len(acc), deps=[s])
        mbarrier.arrive(k.empty.index(slot), count=1)
        following, shrink, total, peak = softmax(
            s, tile, rows, scores, total, peak, v, SCORED, SOFTCAP, MASKED, BLOCK_S
        )
        # what spins here keeps the exponentials from being moved behind the wait for p v
        later, full = slot_of(step + 1, STAGES)
        mbarrier.wait(k.full.index(later), full, pred=tile > low)
        acc, p = _landed(ahead, p, following)
        mbarrier.arrive(v.empty.index(before), count=1)
        acc = scaled(acc, shrink)
        step += 1
        tile -= 1
    return tile, step, p, acc, total, peak


@jit
def _begin(order, call, begin, LAYOUT: gl.constexpr):
    """A warpgroup's rows, and their softmax before its first key."""
    places = call.places
    if places is not None:
        places += order.b * call.place_b
    bounds = Bounds(call.first, call.last, order.b * call.bound_b, call.bound_t)
    rows = queries(bounds, places, begin, call.T, call.S, 0, 1, GROUP, LAYOUT)
    total, peak = start_of_softmax(call.sinks, order.h, LAYOUT)
    return rows, total, peak


@jit
def _attend(
    INDEX: gl.constexpr, work, call, order, step, done, SCORED: gl.constexpr,
    SOFTCAP: gl.constexpr, BLOCK_S: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """o of this warpgroup's rows, whose lse is stored, and the step of the next tile of keys."""
    q, k, v = work.q, work.k, work.v
    begin = order.begin + INDEX * GROUP
    rows, total, peak = _begin(order, call, begin, gl.SliceLayout(1, accumulator(BLOCK_S)))
    slope = call.alibi
    if slope is not None:
        slope = gl.load(slope + order.b * call.alibi_b + order.h)
    scores = Scores(call.scale, call.softcap, slope)
    mbarrier.wait(q.full.index(INDEX), done & 1)
    slot, full = slot_of(step, STAGES)
    mbarrier.wait(k.full.index(slot), full)
    s = warpgroup_mma_wait(0, deps=[product(q.memory, INDEX, k.memory, slot)])
    mbarrier.arrive(k.empty.index(slot), count=1)
    p, _, total, peak = softmax(
        s, order.final, rows, scores, total, peak, v, SCORED, SOFTCAP, True, BLOCK_S
    )
    slot, full = slot_of(step + 1, STAGES)
    mbarrier.wait(k.full.index(slot), full, pred=order.final > order.low)
    tile, step, acc = order.final - 1, step + 1, zeros(v.memory)
    for part in gl.static_range(3):
        stop = order.whole_to if part == 0 else order.whole_from if part == 1 else order.low
        tile, step, p, acc, total, peak = absorb(
            INDEX, work, tile, gl.maximum(stop, order.low), order.low, step, p, acc, total, peak,
            rows, scores, SCORED, SOFTCAP, part != 1, BLOCK_S, STAGES,
        )  # fmt: skip
    slot, full = slot_of(step - 1, STAGES)
    mbarrier.wait(v.full.index(slot), full)
    ahead = added(acc, p, v.memory, slot)
    share, lse = settled(total, peak)
    row = (order.b * call.H + order.h).to(gl.int64) * call.T + rows.index
    gl.store(call.lse + row, lse, rows.index < call.T)
    acc, _ = landed(ahead, p)
    mbarrier.arrive(v.empty.index(slot), count=1)
    return shared(acc, share), step


@jit
def _write(INDEX: gl.constexpr, work, order, acc):
    """Begin to store o of this warpgroup's rows from its room in shared memory, which is free."""
    o_at, room, begin = work.o_at, work.room, order.begin + INDEX * GROUP
    for i in gl.static_range(len(room)):
        tile_of(room[i], INDEX).store(acc[i].to(o_at[i].dtype))
    fence_async_shared()
    partition_barrier()
    tma_store(o_at[0], [order.b, order.h, begin, 0], room[0].index(INDEX))
    if len(room) == 2:
        second = o_at[0].block_shape[3]
        tma_store(o_at[1], [order.b, order.h, begin, second], room[1].index(INDEX))


@jit
def _compute(
    INDEX: gl.constexpr, work, call, SCORED: gl.constexpr, SOFTCAP: gl.constexpr,
    SHARED: gl.constexpr, BLOCK_S: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup's part."""
    step, done = 0, 0
    order = _read(work.board, 0)
    while order.begin >= 0:
        acc, step = _attend(INDEX, work, call, order, step, done, SCORED, SOFTCAP, BLOCK_S, STAGES)
        if SHARED:
            _write(INDEX, work, order, acc)
            tma_store_wait(0)
        else:
            mbarrier.arrive(work.q.empty.index(INDEX), count=1)
            tma_store_wait(0)
            partition_barrier()
            _write(INDEX, work, order, acc)
        if SHARED:
            mbarrier.arrive(work.q.empty.index(INDEX), count=1)
        done += 1
        order = _read(work.board, done)
    tma_store_wait(0)


@jit
def _board():
    memory = gl.allocate_shared_memory(
        gl.int32, [_NUMBERS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    full, empty = mbarriers(1).index(0), mbarriers(1).index(0)
    mbarrier.init(full, count=1)
    mbarrier.init(empty, count=_WARPGROUPS)
    return Board(memory, full, empty)


PLAIN = ["T", "S", "H", "groups", "heads", "section", "scale", "softcap"]


@jit(do_not_specialize=PLAIN)
def forward(
    lse_ptr, q0, q1, k0, k1, v0, v1, o0, o1, first_ptr, last_ptr, places_ptr, sinks_ptr, alibi_ptr,
    counter_ptr, bound_b, bound_t, place_b, alibi_b, T, S, H, groups, heads, section, scale,
    softcap, SCORED: gl.constexpr, SOFTCAP: gl.constexpr, SHARED: gl.constexpr,
    BLOCK_S: gl.constexpr, STAGES: gl.constexpr, COMPUTE: gl.constexpr, COPY: gl.constexpr,
):  # fmt: skip
    """o and lse2 of all tiles, over any number of programs. The counter starts at 0.

    q0, q1: descriptors of two pieces of a head, the second None where one holds it; k and so on.
    SHARED: o leaves through the memory of q. COMPUTE, COPY: registers of either kind of thread.
    """
    call = Call(
        lse_ptr, first_ptr, last_ptr, places_ptr, sinks_ptr, alibi_ptr, bound_b, bound_t, place_b,
        alibi_b, T, S, H, groups, heads, section, scale, softcap,
    )  # fmt: skip
    q_at, k_at, v_at, o_at = (q0,), (k0,), (v0,), (o0,)
    if q1 is not None:
        q_at, k_at = (q0, q1), (k0, k1)
    if v1 is not None:
        v_at, o_at = (v0, v1), (o0, o1)
    q = ring(q_at, _WARPGROUPS, 1)
    room = q.memory
    if not SHARED:
        room = memory_for(o_at, _WARPGROUPS)
    elif v1 is None:
        room = (q.memory[0],)
    k, v = ring(k_at, STAGES, _WARPGROUPS), ring(v_at, STAGES, _WARPGROUPS)
    work = Work(o_at, q, k, v, room, _board())
    gl.warp_specialize(
        [
            (_compute, (0, work, call, SCORED, SOFTCAP, SHARED, BLOCK_S, STAGES)),
            (_compute, (1, work, call, SCORED, SOFTCAP, SHARED, BLOCK_S, STAGES)),
            (_copy, (q_at, k_at, v_at, work, call, counter_ptr, BLOCK_S, STAGES)),
        ],
        [4, 1],
        [COMPUTE, COPY],
    )
