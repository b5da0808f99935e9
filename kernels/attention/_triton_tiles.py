"""Pieces of the attention kernels: tiles of heads, the keys that rows see, and their logits.

Kernels group what belongs together in tuples: a Head is where rows of features lie, Queries are a
tile of rows with the keys they see, Scores is what turns products into logits. What a call does
not have is None, and costs nothing.

Features lie in WIDTHS, powers of two that add up to a head's size (80 = 64 + 16): a tile of a head
is a tuple of such pieces.
"""

# pyright: reportArgumentType=false
# mypy: disable-error-code="assignment"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from swathe.kernels.core.tl_math import tanh

LOG2E = tl.constexpr(1.4426950408889634)
FAR = tl.constexpr(2**30)  # past every key


class Head(NamedTuple):
    """Rows of one head: a pointer to the first, elements from row to row, features, and rows.

    Under TMA `at` is a descriptor of (batch, heads, rows, features) and b, h its place there.
    """

    at: Any
    stride: Any
    features: Any
    rows: Any
    b: Any
    h: Any


class Plane(NamedTuple):
    """A mask or bias: where it starts, what leads to its head, and strides (0 where broadcast)."""

    at: Any
    skip: Any
    row: Any
    key: Any


class Bounds(NamedTuple):
    """Keys [first, last) that rows see, what leads to their sequence, and from row to row.

    `places` are their key positions, which otherwise are row + shift.
    """

    first: Any
    last: Any
    skip: Any
    row: Any
    places: Any
    place_skip: Any
    shift: Any


class Queries(NamedTuple):
    """A tile of rows beside keys, each field (rows, 1) or (1, rows); `place` is a key position."""

    index: Any
    live: Any
    first: Any
    last: Any
    place: Any


class Scores(NamedTuple):
    """Numbers and masks of one head's scores; a bias of `lowest` hides a key.

    alibi: a Plane of one slope. keys: a Plane whose rows are alike.
    """

    scale: Any
    softcap: Any
    alibi: Any
    keys: Any
    allowed: Any
    bias: Any
    lowest: Any


class Dropout(NamedTuple):
    """What decides which weights are dropped: seed, head of the whole batch, probability."""

    seed: Any
    head: Any
    probability: Any


@triton.jit
def load_rows(x, row, live, WIDTHS: tl.constexpr, EXACT: tl.constexpr):
    """Any rows of a head, 0 where not live and past its features, which EXACT rules out."""
    pieces = ()
    begin = 0
    at = x.at + row.to(tl.int64)[:, None] * x.stride
    for i in tl.static_range(len(WIDTHS)):
        d = begin + tl.arange(0, WIDTHS[i])[None, :]
        if EXACT:
            piece = tl.load(at + d, live[:, None], other=0.0)
        else:
            piece = tl.load(at + d, live[:, None] & (d < x.features), other=0.0)
        pieces = pieces + (piece,)
        begin += WIDTHS[i]
    return pieces


@triton.jit
def load_tile(
    x, start, BLOCK: tl.constexpr, WIDTHS: tl.constexpr, EXACT: tl.constexpr, TMA: tl.constexpr
):
    """BLOCK rows of a head from `start` on, 0 past its last."""
    if TMA:
        box = x.at.load([x.b.to(tl.int32), x.h.to(tl.int32), start, 0])
        return (tl.reshape(box, (BLOCK, box.shape[3])),)
    else:
        row = start + tl.arange(0, BLOCK)
        return load_rows(x, row, row < x.rows, WIDTHS, EXACT)


@triton.jit
def store_tile(x, start, tile, BLOCK: tl.constexpr, WIDTHS: tl.constexpr):
    """Write BLOCK rows of a head, rounded to the memory's dtype."""
    row = (start + tl.arange(0, BLOCK))[:, None]
    at = x.at + row.to(tl.int64) * x.stride
    begin = 0
    for i in tl.static_range(len(WIDTHS)):
        d = begin + tl.arange(0, WIDTHS[i])[None, :]
        value = tile[i].to(x.at.dtype.element_ty)
        tl.store(at + d, value, (row < x.rows) & (d < x.features))
        begin += WIDTHS[i]


@triton.jit
def zeros(M: tl.constexpr, WIDTHS: tl.constexpr):
    """A tile of M rows that nothing was added to yet."""
    tile = ()
    for i in tl.static_range(len(WIDTHS)):
        tile = tile + (_zeros(M, WIDTHS[i]),)
    return tile


@triton.jit
def _zeros(M: tl.constexpr, N: tl.constexpr):
    return tl.zeros((M, N), tl.float32)


@triton.jit
def scaled(tile, by):
    """Every piece of a tile times `by`."""
    pieces = ()
    for i in tl.static_range(len(tile)):
        pieces = pieces + (tile[i] * by,)
    return pieces


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a b^T over all features, in fp32."""
    s = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    for i in tl.static_range(1, len(a)):
        s = tl.dot(a[i], tl.trans(b[i]), s, input_precision=PRECISION)
    return s


@triton.jit
def added(acc, p, x, PRECISION: tl.constexpr):
    """acc + p x, piece by piece."""
    pieces = ()
    for i in tl.static_range(len(x)):
        pieces = pieces + (tl.dot(p, x[i], acc[i], input_precision=PRECISION),)
    return pieces


@triton.jit
def queries(bounds, start, T, S, BLOCK: tl.constexpr, AXIS: tl.constexpr):
    """A tile of rows with the keys that each sees; a row that is not there sees none."""
    index = tl.expand_dims(start + tl.arange(0, BLOCK), AXIS)
    live = index < T
    at = bounds.skip + index * bounds.row
    first = tl.load(bounds.first + at, live, other=FAR)
    last = tl.load(bounds.last + at, live, other=0)
    place = index + bounds.shift
    if bounds.places is not None:
        place = tl.load(bounds.places + bounds.place_skip + index, live, other=0)
    return Queries(index, live, tl.maximum(first, 0), tl.minimum(last, S), place)


@triton.jit
def _of_plane(plane, rows, n, S, other):
    row, key = rows.index.to(tl.int64) * plane.row, n.to(tl.int64) * plane.key
    return tl.load(plane.at + plane.skip + row + key, rows.live & (n < S), other=other)


@triton.jit
def visibility(rows, n, S, scores):
    """Which keys n of a tile rows see, and the bias of their scores, if there is one.

    A softmax asks for both before the product that makes its scores: Triton lays row sums out as
    the last of what leads to them in the program, and twice where loads come after the product.
    """
    visible = (n >= rows.first) & (n < rows.last)
    bias = visible
    if scores.keys.at is not None:
        visible &= tl.load(scores.keys.at + scores.keys.skip + n, n < S, other=0) != 0
    if scores.allowed.at is not None:
        visible &= _of_plane(scores.allowed, rows, n, S, 0) != 0
    if scores.bias.at is not None:
        bias = _of_plane(scores.bias, rows, n, S, 0.0).to(tl.float32)
        visible &= bias > scores.lowest
    return visible, bias


@triton.jit
def logits(
    s, rows, n, visible, bias, scores, SCORED: tl.constexpr, SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Logits z, -inf where a key is hidden; their factor to units of log 2; the softcap's tanh.

    Scores that are only scaled (not SCORED, by a positive number) leave the scale to the factor,
    which is one multiply-add with the peak's subtraction.
    """
    z, t, factor = s, s, scores.scale * LOG2E
    if SCORED:
        z *= scores.scale
        if SOFTCAP:
            t = tanh(z / scores.softcap)
            z = t * scores.softcap
        if scores.alibi.at is not None:
            slope = tl.load(scores.alibi.at + scores.alibi.skip)
            z += slope * (n - rows.place).to(tl.float32)
        if scores.bias.at is not None:
            z += bias
        factor = LOG2E
    if MASKED:
        z = tl.where(visible, z, float("-inf"))
    return z, factor, t


@triton.jit
def kept(dropout, rows, n):
    """Which weights of a tile stay: a function of seed, head, row and key alone."""
    row, key = tl.broadcast(rows.index, n)
    head = dropout.head.to(tl.uint32) + key * 0
    bits, _, _, _ = tl.philox(tl.load(dropout.seed), key, row, head, key * 0)
    return tl.uint_to_uniform_float(bits) >= dropout.probability


@triton.jit
def place(tiles, H, groups):
    """Row tile, query head, key head, sequence of a program; late tiles, which see more, first."""
    p = tl.program_id(0)
    tile = tiles - 1 - p % tiles
    h = (p // tiles) % H
    b = (p // tiles // H).to(tl.int64)
    return tile, h.to(tl.int64), (h // groups).to(tl.int64), b
