"""Pieces of the attention kernels for Hopper: tiles in shared memory, row intervals, logits.

Copies    a Ring is a few stages of shared memory that one warp fills and others empty. Step i uses
          slot i % STAGES; full and empty are mbarriers, one a slot, whose phases say which turn of
          the ring a slot is in.
Heads     a head's features are one or two pieces, each with descriptors of its own: 192 = 128 + 64.
          What is kept for each piece is a tuple, and stays one where there is a single piece.
Products  of one warpgroup are 64 rows; accumulators hold fp32 in registers.
Rows      first, last: the interval of keys that a row sees, int32, as mask.bounds makes them.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# mypy: disable-error-code="assignment"

from __future__ import annotations

from typing import Any, NamedTuple

from swathe.kernels.core.gluon import (
    box_bytes,
    constexpr_function,
    gl,
    jit,
    mbarrier,
    mbarriers,
    tma_load,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LOG2E = gl.constexpr(1.4426950408889634)
FAR = gl.constexpr(2**30)  # past every key
GROUP = gl.constexpr(64)  # rows of a warpgroup's product


class Ring(NamedTuple):
    """Stages of shared memory, a tuple of pieces, and the mbarriers of their slots."""

    memory: Any
    full: Any
    empty: Any


class Bounds(NamedTuple):
    """Keys [first, last) that rows see, what leads to their sequence, and from row to row."""

    first: Any
    last: Any
    skip: Any
    row: Any


class Queries(NamedTuple):
    """A tile of rows beside keys, each field (rows, 1) or (1, rows); `place` is a key position."""

    index: Any
    first: Any
    last: Any
    place: Any


class Scores(NamedTuple):
    """Numbers of one head's scores; `slope` is ALiBi's, None without."""

    scale: Any
    softcap: Any
    slope: Any


@constexpr_function
def accumulator(width: Any) -> Any:
    """Layout of a warpgroup's 64 rows of `width` sums."""
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, width, 16]
    )


@constexpr_function
def operand(width: Any) -> Any:
    """Layout of 16-bit rows in registers that multiply something `width` wide."""
    return gl.DotOperandLayout(operand_index=0, parent=accumulator(width), k_width=2)


@jit
def slot_of(step, STAGES: gl.constexpr):
    """Where the ring holds a step, and the parity of the phase in which it is full."""
    return step % STAGES, (step // STAGES) & 1


@jit
def memory_for(descriptors, COUNT: gl.constexpr):
    """Room for COUNT boxes of each descriptor, as a tuple."""
    memory = ()
    for i in gl.static_range(len(descriptors)):
        memory = memory + (_boxes(descriptors[i], COUNT),)
    return memory


@jit
def _boxes(descriptor, COUNT: gl.constexpr):
    SHAPE: gl.constexpr = descriptor.block_shape
    return gl.allocate_shared_memory(
        descriptor.dtype, [COUNT, 1, 1, SHAPE[2], SHAPE[3]], descriptor.layout
    )


@jit
def ring(descriptors, STAGES: gl.constexpr, READERS: gl.constexpr):
    """An empty ring for boxes of the descriptors; READERS partitions empty each of its slots."""
    full, empty = mbarriers(STAGES), mbarriers(STAGES)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=READERS)
    return Ring(memory_for(descriptors, STAGES), full, empty)


@jit
def fill(ring, descriptors, b, h, row, step, STAGES: gl.constexpr):
    """Copy rows of head h of sequence b into the slot of a step, once that is empty."""
    slot, phase = slot_of(step, STAGES)
    mbarrier.wait(ring.empty.index(slot), phase ^ 1)
    load(ring, descriptors, b, h, row, slot)


@jit
def load(ring, descriptors, b, h, row, slot):
    """Copy rows of a head, all its pieces, into a slot, which is full when they are there."""
    full = ring.full.index(slot)
    if len(descriptors) == 1:
        mbarrier.expect(full, box_bytes(descriptors[0]))
        tma_load(descriptors[0], [b, h, row, 0], full, ring.memory[0].index(slot))
    else:
        mbarrier.expect(full, box_bytes(descriptors[0]) + box_bytes(descriptors[1]))
        tma_load(descriptors[0], [b, h, row, 0], full, ring.memory[0].index(slot))
        second = descriptors[0].block_shape[3]
        tma_load(descriptors[1], [b, h, row, second], full, ring.memory[1].index(slot))


@jit
def tile_of(memory, slot):
    """A slot of one piece as (rows, features)."""
    SHAPE: gl.constexpr = memory.shape
    return memory.index(slot).reshape([SHAPE[3], SHAPE[4]])


@jit
def product(a, a_slot, b, b_slot):
    """Begin a b^T over all features from shared memory: fp32, one group of wgmma a piece."""
    WIDTH: gl.constexpr = b[0].shape[3]
    s = gl.zeros([GROUP, WIDTH], gl.float32, accumulator(WIDTH))
    s = _times(tile_of(a[0], a_slot), tile_of(b[0], b_slot), s, False)
    for i in gl.static_range(1, len(a)):
        s = _times(tile_of(a[i], a_slot), tile_of(b[i], b_slot), s, True)
    return s


@jit
def _times(a, b, s, ADD: gl.constexpr):
    return warpgroup_mma(a, b.permute([1, 0]), s, use_acc=ADD, is_async=True)


@jit
def zeros(memory):
    """Sums, piece by piece, that nothing was added to yet."""
    acc = ()
    for i in gl.static_range(len(memory)):
        acc = acc + (_zeros(memory[i].shape[4]),)
    return acc


@jit
def _zeros(WIDTH: gl.constexpr):
    return gl.zeros([GROUP, WIDTH], gl.float32, accumulator(WIDTH))


@jit
def added(acc, p, x, slot):
    """Begin acc + p x, piece by piece, of p in registers and x in shared memory."""
    pieces = ()
    for i in gl.static_range(len(x)):
        pieces = pieces + (_plus(acc[i], p, tile_of(x[i], slot)),)
    return pieces


@jit
def _plus(acc, p, x):
    p = gl.convert_layout(p, operand(x.shape[1]), assert_trivial=True)
    return warpgroup_mma(p, x, acc, is_async=True)


@jit
def landed(acc, p):
    """Sums whose products are done, and p, which the wait may not run ahead of."""
    if len(acc) == 1:
        first, p = warpgroup_mma_wait(0, deps=[acc[0], p])
        return (first,), p
    else:
        first, second, p = warpgroup_mma_wait(0, deps=[acc[0], acc[1], p])
        return (first, second), p


@jit
def scaled(acc, by):
    """Every piece times a number a row."""
    pieces = ()
    for i in gl.static_range(len(acc)):
        pieces = pieces + (_scaled(acc[i], by),)
    return pieces


@jit
def _scaled(piece, by):
    LAYOUT: gl.constexpr = gl.SliceLayout(1, accumulator(piece.shape[1]))
    return piece * gl.expand_dims(gl.convert_layout(by, LAYOUT), 1)


@jit
def intervals(bounds, index, T, S):
    """First and last of rows, among the keys that are there; a row past T sees none."""
    at, live = bounds.skip + index * bounds.row, index < T
    first = gl.load(bounds.first + at, live, other=FAR)
    last = gl.load(bounds.last + at, live, other=0)
    return gl.maximum(first, 0), gl.minimum(last, S)


@jit
def queries(
    bounds, places, begin, T, S, shift, AXIS: gl.constexpr, BLOCK: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """A tile of rows with the keys that each sees; `places` are key positions or None."""
    index = begin + gl.arange(0, BLOCK, layout=LAYOUT)
    first, last = intervals(bounds, index, T, S)
    place = index + shift
    if places is not None:
        place = gl.load(places + index, index < T, other=0)
    first, last = gl.expand_dims(first, AXIS), gl.expand_dims(last, AXIS)
    return Queries(index, first, last, gl.expand_dims(place, AXIS))


@jit
def extents(bounds, begin, T, S, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """The first key that any of ROWS rows sees and one past the last; from and to which all see."""
    low, high, whole_from, whole_to = FAR, 0, 0, S
    for i in gl.static_range(ROWS // GROUP):
        index = begin + i * GROUP + gl.arange(0, GROUP, layout=LAYOUT)
        first, last = intervals(bounds, index, T, S)
        low, high = gl.minimum(low, gl.min(first, 0)), gl.maximum(high, gl.max(last, 0))
        live = index < T
        whole_from = gl.maximum(whole_from, gl.max(gl.where(live, first, 0), 0))
        whole_to = gl.minimum(whole_to, gl.min(gl.where(live, last, S), 0))
    return low, high, whole_from, whole_to


@jit
def stretches(bounds, begin, T, S, ROWS: gl.constexpr, BLOCK_S: gl.constexpr, LAYOUT: gl.constexpr):
    """Key tiles that rows from `begin` on see: the first and the last, from where and to where all
    rows see whole tiles. Rows that see nothing are given a tile, all of whose keys are hidden.
    """
    low, high, whole_from, whole_to = extents(bounds, begin, T, S, ROWS, LAYOUT)
    final = gl.maximum(high - 1, 0) // BLOCK_S
    low = gl.minimum(low // BLOCK_S, final)
    return low, gl.cdiv(whole_from, BLOCK_S), whole_to // BLOCK_S, final


@jit
def tanh(x):
    """tanh(x), also near 0 where its quotient of exponentials cancels: core/tl_math.py's."""
    square = x * x
    near = -5.70498872745e-3 * square + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    near = near * square * x + x
    far = 1.0 - 2.0 / (gl.exp(2.0 * gl.abs(x)) + 1.0)
    return gl.where(gl.abs(x) < 0.625, near, gl.where(x < 0, -far, far))


@jit
def logits(s, rows, n, scores, SCORED: gl.constexpr, SOFTCAP: gl.constexpr, MASKED: gl.constexpr):
    """Logits z, -inf where a key is hidden; their factor to units of log 2; the softcap's tanh.

    Scores that are only scaled (not SCORED, by a positive number) leave the scale to the factor,
    which is one multiply-add with the peak's subtraction.
    """
    z, t, factor = s, s, scores.scale * LOG2E
    if SCORED:
        if SOFTCAP:
            t = tanh(s * (scores.scale / scores.softcap))
            z = t * scores.softcap
        else:
            z = s * scores.scale
        if scores.slope is not None:
            z += scores.slope * (n - rows.place).to(gl.float32)
        factor = LOG2E
    if MASKED:
        z = gl.where((n >= rows.first) & (n < rows.last), z, float("-inf"))
    return z, factor, t


@jit
def weigh(
    s, rows, n, scores, total, peak, SCORED: gl.constexpr, SOFTCAP: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """One step of the online softmax: weights of a tile of scores, and what shrinks the sums."""
    z, factor, _ = logits(s, rows, n, scores, SCORED, SOFTCAP, MASKED)
    higher = gl.maximum(peak, gl.max(z, 1) * factor)
    base = higher
    if MASKED:
        # rows that have seen nothing yet have no peak to subtract
        base = gl.where(higher == float("-inf"), 0.0, higher)
    p, shrink = gl.exp2(z * factor - gl.expand_dims(base, 1)), gl.exp2(peak - base)
    return p, shrink, total * shrink + gl.sum(p, 1), higher


@jit
def start_of_softmax(sinks_ptr, h, LAYOUT: gl.constexpr):
    """Total and peak of rows before their first key; a sink is a key that they start with."""
    peak = gl.full([GROUP], float("-inf"), gl.float32, LAYOUT)
    total = gl.zeros([GROUP], gl.float32, LAYOUT)
    if sinks_ptr is not None:
        sink = gl.load(sinks_ptr + h) * LOG2E
        peak = gl.zeros([GROUP], gl.float32, LAYOUT) + sink
        total += gl.where(sink > float("-inf"), 1.0, 0.0)
    return total, peak


@jit
def settled(total, peak):
    """What o is to be multiplied by once all keys are absorbed, and lse2: 0 and -inf of none."""
    some = total != 0
    safe = gl.where(some, total, 1.0)
    share = gl.where(some, 1.0 / safe, 0.0)
    return share, gl.where(some, peak + gl.log2(safe), float("-inf"))


@jit
def shared(acc, share):
    """Every piece times its rows' share; 0 where that is 0, whatever hidden values were NaN."""
    pieces = ()
    for i in gl.static_range(len(acc)):
        pieces = pieces + (_shared(acc[i], share),)
    return pieces


@jit
def _shared(piece, share):
    LAYOUT: gl.constexpr = gl.SliceLayout(1, accumulator(piece.shape[1]))
    share = gl.expand_dims(gl.convert_layout(share, LAYOUT), 1)
    return gl.where(share != 0.0, piece * share, 0.0)


@jit
def place(turn, tiles, heads, section):
    """Row tile and head of the batch of a turn: late tiles, which see more, first.

    Heads take turns in sections whose keys and values fit into the L2 cache together.
    """
    begin = turn // (tiles * section) * section
    width = gl.minimum(section, heads - begin)
    rest = turn % (tiles * section)
    return tiles - 1 - rest // width, begin + rest % width
