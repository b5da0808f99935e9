"""Small Gluon kernels that are right, for tests of the emulator to run and to plant faults in."""

# pyright: reportArgumentType=false
# mypy: disable-error-code="assignment"

from __future__ import annotations

from typing import Any, NamedTuple

from swathe.kernels.core.gluon import (
    arrive_warpgroups,
    box_bytes,
    constexpr_function,
    fence_async_shared,
    gl,
    jit,
    mbarrier,
    mbarriers,
    partition_barrier,
    reinterpret,
    sync_warpgroups,
    tma_add,
    tma_load,
    tma_store,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)

ROWS = gl.constexpr(64)


class Ring(NamedTuple):
    """Stages of two operands with the mbarriers of their slots."""

    a: Any
    b: Any
    full: Any
    empty: Any


@constexpr_function
def accumulator(width: Any, warps: Any = 4) -> Any:
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, width, 16]
    )


@constexpr_function
def operand(width: Any) -> Any:
    return gl.DotOperandLayout(operand_index=0, parent=accumulator(width), k_width=2)


@jit
def _copy(ring, a_at, b_at, row, column, steps, STAGES: gl.constexpr):
    """Fill the ring with tiles of a and b."""
    for i in range(steps):
        slot, phase = i % STAGES, (i // STAGES) & 1
        mbarrier.wait(ring.empty.index(slot), phase ^ 1)
        full = ring.full.index(slot)
        mbarrier.expect(full, box_bytes(a_at) + box_bytes(b_at))
        tma_load(a_at, [row, i * 64], full, ring.a.index(slot))
        tma_load(b_at, [column, i * 64], full, ring.b.index(slot))


@jit
def _multiply(ring, out_at, room, row, column, steps, STAGES: gl.constexpr):
    """out = a b^T, one product being in flight while the next begins."""
    WIDTH: gl.constexpr = out_at.block_shape[1]
    acc = gl.zeros([ROWS, WIDTH], gl.float32, accumulator(WIDTH))
    for i in range(steps):
        slot, phase = i % STAGES, (i // STAGES) & 1
        mbarrier.wait(ring.full.index(slot), phase)
        b = ring.b.index(slot).permute([1, 0])
        acc = warpgroup_mma(ring.a.index(slot), b, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(ring.empty.index((i + STAGES - 1) % STAGES), count=1, pred=i > 0)
    acc = warpgroup_mma_wait(0, deps=[acc])
    room.store(acc.to(out_at.dtype))
    fence_async_shared()
    partition_barrier()
    tma_store(out_at, [row, column], room)
    tma_store_wait(0)


@jit
def matmul(a_at, b_at, out_at, K, STAGES: gl.constexpr):
    """out (M, N) = a (M, K) b (N, K)^T in tiles of a box of out."""
    WIDTH: gl.constexpr = b_at.block_shape[0]
    a = gl.allocate_shared_memory(a_at.dtype, [STAGES, ROWS, 64], a_at.layout)
    b = gl.allocate_shared_memory(b_at.dtype, [STAGES, WIDTH, 64], b_at.layout)
    room = gl.allocate_shared_memory(out_at.dtype, [ROWS, WIDTH], out_at.layout)
    full, empty = mbarriers(STAGES), mbarriers(STAGES)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    ring = Ring(a, b, full, empty)
    row, column = gl.program_id(0) * ROWS, gl.program_id(1) * WIDTH
    steps = gl.cdiv(K, 64)
    gl.warp_specialize(
        [
            (_multiply, (ring, out_at, room, row, column, steps, STAGES)),
            (_copy, (ring, a_at, b_at, row, column, steps, STAGES)),
        ],
        [1],
        [24],
    )


@jit
def _attend(INDEX: gl.constexpr, x, full, out_at, room, TURNS: gl.constexpr):
    """Weights of one tile of rows for both, in registers, times both; taking turns to begin."""
    if TURNS and INDEX == 1:
        arrive_warpgroups(8, 256)
    acc = gl.zeros([ROWS, 64], gl.float32, accumulator(64))
    empty = gl.zeros([ROWS, 64], gl.float32, accumulator(64))
    mbarrier.wait(full.index(INDEX), 0)
    for i in range(2):
        mbarrier.wait(full.index(i), 0)
        if TURNS:
            sync_warpgroups(8 + INDEX, 256)
        keys = x.index(i).permute([1, 0])
        s = warpgroup_mma(x.index(INDEX), keys, empty, use_acc=False, is_async=True)
        if TURNS:
            arrive_warpgroups(9 - INDEX, 256)
        s = warpgroup_mma_wait(0, deps=[s])
        p = gl.convert_layout(gl.exp2(s * 0.125).to(out_at.dtype), operand(64))
        ahead = warpgroup_mma(p, x.index(i), acc, is_async=True)
        acc, p = warpgroup_mma_wait(0, deps=[ahead, p])
    room.index(INDEX).store(acc.to(out_at.dtype))
    fence_async_shared()
    sync_warpgroups(10, 256)
    # each stores what the other computed
    tma_store(out_at, [(1 - INDEX) * ROWS, 0], room.index(1 - INDEX))
    tma_store_wait(0)


@jit
def _both(x_at, x, full):
    for i in gl.static_range(2):
        mbarrier.expect(full.index(i), box_bytes(x_at))
        tma_load(x_at, [i * ROWS, 0], full.index(i), x.index(i))


@jit
def attend(x_at, out_at, TURNS: gl.constexpr):
    """out = exp2(x x^T / 8) x of 128 rows of 64, by two warpgroups."""
    x = gl.allocate_shared_memory(x_at.dtype, [2, ROWS, 64], x_at.layout)
    room = gl.allocate_shared_memory(out_at.dtype, [2, ROWS, 64], out_at.layout)
    full = mbarriers(2)
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
    gl.warp_specialize(
        [
            (_attend, (0, x, full, out_at, room, TURNS)),
            (_attend, (1, x, full, out_at, room, TURNS)),
            (_both, (x_at, x, full)),
        ],
        [4, 1],
        [240, 24],
    )


@jit
def _hand_out(counter, board, full, empty, tiles):
    """Put the next tile's number on the board until there is none."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    turn, done = gl.program_id(0), 0
    while turn < tiles:
        mbarrier.wait(empty, (done & 1) ^ 1)
        board.store(gl.full([1], 0, gl.int32, LAYOUT) + turn)
        mbarrier.arrive(full, count=1)
        turn = gl.atomic_add(counter, 1) + gl.num_programs(0)
        done += 1
    mbarrier.wait(empty, (done & 1) ^ 1)
    board.store(gl.full([1], 0, gl.int32, LAYOUT) + tiles)
    mbarrier.arrive(full, count=1)


@jit
def _sum_up(x_at, sums_at, x, room, there, board, full, empty, tiles):
    """Add each tile that the board names to the sums, in place of the tile before's."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    BLOCK: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    done = 0
    mbarrier.wait(full, 0)
    turn = gl.max(board.load(LAYOUT), 0)
    mbarrier.arrive(empty, count=1)
    while turn < tiles:
        mbarrier.expect(there, box_bytes(x_at))
        tma_load(x_at, [turn * ROWS, 0], there, x)
        mbarrier.wait(there, done & 1)
        twice = x.load(BLOCK) * 2.0
        tma_store_wait(0)
        partition_barrier()
        room.store(twice)
        fence_async_shared()
        partition_barrier()
        tma_add(sums_at, [0, 0], room)
        done += 1
        mbarrier.wait(full, done & 1)
        turn = gl.max(board.load(LAYOUT), 0)
        mbarrier.arrive(empty, count=1)
    tma_store_wait(0)


@jit
def sum_tiles(x_at, sums_at, counter, tiles):
    """sums (64, 32) += twice each of x's tiles of 64 rows, by programs that share a counter."""
    x = gl.allocate_shared_memory(x_at.dtype, [ROWS, 32], x_at.layout)
    room = gl.allocate_shared_memory(x_at.dtype, [ROWS, 32], sums_at.layout)
    board = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bars = mbarriers(3)
    for i in gl.static_range(3):
        mbarrier.init(bars.index(i), count=1)
    there, full, empty = bars.index(0), bars.index(1), bars.index(2)
    gl.warp_specialize(
        [
            (_sum_up, (x_at, sums_at, x, room, there, board, full, empty, tiles)),
            (_hand_out, (counter, board, full, empty, tiles)),
        ],
        [1],
        [24],
    )


@jit
def swap_halves(x_at, out_at, HALF: gl.constexpr):
    """out = x with its halves of 64 columns swapped, through memory seen as another tensor's."""
    BLOCK: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    x = gl.allocate_shared_memory(x_at.dtype, [1, 1, ROWS, 2 * HALF], x_at.layout)
    there = mbarriers(1)
    mbarrier.init(there.index(0), count=1)
    fence_async_shared()
    mbarrier.expect(there.index(0), box_bytes(x_at))
    tma_load(x_at, [0, 0, 0, 0], there.index(0), x)
    mbarrier.wait(there.index(0), 0)
    rows = x.reshape([ROWS, 2 * HALF])
    left, right = rows.slice(0, HALF, 1).load(BLOCK), rows.slice(HALF, HALF, 1).load(BLOCK)
    partition_barrier()
    out = reinterpret(x, out_at.dtype, [1, 1, ROWS, 2 * HALF], out_at.layout)
    halves = out.reshape([ROWS, 2 * HALF])
    halves.slice(0, HALF, 1).store(right.to(out_at.dtype))
    halves.slice(HALF, HALF, 1).store(left.to(out_at.dtype))
    fence_async_shared()
    partition_barrier()
    tma_store(out_at, [0, 0, 0, 0], out)
    tma_store_wait(0)


@jit
def scale_rows(x_ptr, scale_ptr, out_ptr, rows, COLUMNS: gl.constexpr):
    """out (rows, COLUMNS) = x times a number a row, by pointers; rows need not fill the last."""
    BLOCK: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    index = gl.program_id(0) * 16 + gl.arange(0, 16, layout=gl.SliceLayout(1, BLOCK))
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, BLOCK))
    at = index.to(gl.int64)[:, None] * COLUMNS + column[None, :]
    live = (index < rows)[:, None] & (column < COLUMNS)[None, :]
    x = gl.load(x_ptr + at, live, other=0.0)
    scale = gl.load(scale_ptr + index, index < rows, other=0.0)
    gl.store(out_ptr + at, x * scale[:, None], live)
