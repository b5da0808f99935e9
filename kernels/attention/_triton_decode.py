"""Attention of few queries over a long cache: its keys are split among programs, then folded.

    split i   peak_i = max z      total_i = sum 2^(z - peak_i)      acc_i = sum 2^(z - peak_i) v
    o         sum_i w_i acc_i / sum_i w_i total_i       w_i = 2^(peak_i - max peak)

Shapes   q: (B, H, T, D).  k: (B, K, S, D).  v: (B, K, S, E).  o: (B, T, H, E).  lse2: (B, H, T).
         Paged: k (pages, K, page, D), v (pages, K, page, E), block_table (B, pages of a sequence).
         Features adjacent, every other stride free: no copies.
Rows     the T queries of the H / K heads that share keys are rows of one tile, queries outermost.
Splits   a tile of rows sees keys [lo, hi). How these are split is a function of lo and hi alone:
         into equal parts of at least Tiling.fewest keys, at most Tiling.most of them. The grid is
         the same for all lengths, and a program may take several splits: a captured graph serves
         every length, and bits depend on neither batch, capacity, paging nor multiprocessors.
Memory   only keys in [lo, hi) are read, and only the pages that hold them: the rest of a cache and
         of a block table may be anything. Partial sums are fp32, written and read only where a
         tile has more than one split.
Rounding as the forward kernel: fp32 scores and sums, p rounded to v's dtype, o rounded once.
"""

# pyright: reportArgumentType=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from swathe.kernels.attention._triton_forward import settled, weigh
from swathe.kernels.attention._triton_tiles import (
    FAR,
    LOG2E,
    Bounds,
    Head,
    Plane,
    Queries,
    Scores,
    added,
    load_rows,
    product,
    scaled,
    visibility,
    zeros,
)
from swathe.kernels.attention.op import strides_of
from swathe.kernels.core.device import arch, guard, multiprocessors
from swathe.kernels.core.launch import Launcher, cdiv, next_power_of_2
from swathe.kernels.core.rows import unit_rows

INF = tl.constexpr(float("inf"))
_AMD = torch.version.hip is not None
PROGRAMS = 16  # a multiprocessor: enough to even out lengths, few enough that idle ones are cheap


class Cache(NamedTuple):
    """Keys or values of one head: where, elements from page to page and row to row, features."""

    at: Any
    page: Any
    row: Any
    features: Any


@triton.jit
def packed(bounds, r, T, S, groups):
    """Rows r, of (query, head of the group), and the keys that each sees: from FAR to 0 if none."""
    index = (r // groups)[:, None]
    live = index < T
    at = bounds.skip + index * bounds.row
    first = tl.maximum(tl.load(bounds.first + at, live, other=0), 0)
    last = tl.minimum(tl.load(bounds.last + at, live, other=0), S)
    some = first < last
    place = index + bounds.shift
    if bounds.places is not None:
        place = tl.load(bounds.places + bounds.place_skip + index, live, other=0)
    return Queries(index, live, tl.where(some, first, FAR), tl.where(some, last, 0), place)


@triton.jit
def partition(rows, FEWEST: tl.constexpr, MOST: tl.constexpr, BLOCK_S: tl.constexpr):
    """Keys [lo, hi) that rows see, where their first tile begins, keys of a split, and splits."""
    lo, hi = tl.min(rows.first), tl.max(rows.last)
    begin = tl.minimum(lo, hi) // BLOCK_S * BLOCK_S
    tiles = tl.cdiv(hi - begin, BLOCK_S)
    splits = tl.maximum(tl.minimum(tl.cdiv(tiles * BLOCK_S, FEWEST), MOST), 1)
    each = tl.maximum(tl.cdiv(tiles, splits), 1)
    return lo, hi, begin, each * BLOCK_S, tl.maximum(tl.cdiv(tiles, each), 1)


@triton.jit
def _load(cache, page, place, seen, WIDTHS: tl.constexpr, EXACT: tl.constexpr):
    head = Head(cache.at + page * cache.page, cache.row, cache.features, 0, 0, 0)
    return load_rows(head, place, seen, WIDTHS, EXACT)


@triton.jit
def _absorb(
    start, end, lo, hi, q, k, v, b, table, rows, S, scores, acc, total, peak,
    SCORED: tl.constexpr, SOFTCAP: tl.constexpr, D_WIDTHS: tl.constexpr, E_WIDTHS: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr, PAGE: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The online softmax over the keys of one split, from start to end."""
    # bounds and a mask of keys have no part in the sums' layout, and take registers while they wait
    LATE: tl.constexpr = scores.allowed.at is None and scores.bias.at is None
    for begin in range(start, end, BLOCK_S):
        n = begin + tl.arange(0, BLOCK_S)
        there = (n >= lo) & (n < hi)
        # without pages, a sequence is a page of its own
        page, place = b, n
        if table is not None:
            place = n % PAGE
            if PAGE % BLOCK_S == 0:
                page = tl.load(table + begin // PAGE).to(tl.int64)
            else:
                page = tl.load(table + n // PAGE, there, other=0).to(tl.int64)[:, None]
        if not LATE:
            visible, bias = visibility(rows, n[None, :], S, scores)
        keys = _load(k, page, place, there, D_WIDTHS, EXACT)
        s = product(q, keys, PRECISION)
        if LATE:
            visible, bias = visibility(rows, n[None, :], S, scores)
        p, shrink, total, peak = weigh(
            s, rows, n[None, :], visible, bias, scores, total, peak, SCORED, SOFTCAP, True
        )
        values = _load(v, page, place, there, E_WIDTHS, EXACT)
        acc = added(scaled(acc, shrink[:, None]), p.to(values[0].dtype), values, PRECISION)
    return acc, total, peak


@triton.jit
def _store_rows(at, row, live, tile, features, WIDTHS: tl.constexpr):
    """Write a tile whose rows lie `row` elements past `at`, rounded to the memory's dtype."""
    begin = 0
    for i in tl.static_range(len(WIDTHS)):
        d = begin + tl.arange(0, WIDTHS[i])[None, :]
        value = tile[i].to(at.dtype.element_ty)
        tl.store(at + row[:, None] + d, value, live[:, None] & (d < features))
        begin += WIDTHS[i]


@triton.jit
def _store(
    r, b, g, T, K, groups, E, o_ptr, lse_ptr, parts_ptr, sums_ptr, split, splits, count, acc,
    total, peak, E_WIDTHS: tl.constexpr,
):  # fmt: skip
    """o and lse of rows whose keys are all in one split, else the sums of this one."""
    t, h, live = r // groups, g * groups + r % groups, r < T * groups
    out = (b * K * groups + h) * T + t
    if count == 1:
        acc, lse = settled(acc, total, peak)
        _store_rows(o_ptr, ((b * T + t) * K * groups + h) * E, live, acc, E, E_WIDTHS)
        tl.store(lse_ptr + out, lse, live)
    elif parts_ptr is not None:
        at = out * splits + split
        _store_rows(parts_ptr, at * E, live, acc, E, E_WIDTHS)
        tl.store(sums_ptr + 2 * at, peak, live)
        tl.store(sums_ptr + 2 * at + 1, total, live)


PLAIN = [
    "bound_b", "bound_t", "place_b", "table_b", "alibi_b", "keys_b", "T", "S", "B", "K", "groups",
    "splits", "slots", "shift", "scale", "softcap", "lowest",
]  # fmt: skip


@triton.jit(do_not_specialize=PLAIN)
def attend(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, parts_ptr, sums_ptr, first_ptr, last_ptr, places_ptr,
    table_ptr, sinks_ptr, alibi_ptr, keys_ptr, allowed_ptr, bias_ptr, q_b, q_h, q_t, k_b, k_h, k_s,
    v_b, v_h, v_s, a_b, a_h, a_t, a_s, b_b, b_h, b_t, b_s, D, E, bound_b, bound_t, place_b,
    table_b, alibi_b, keys_b, T, S, B, K, groups, splits, slots, shift, scale, softcap, lowest,
    SCORED: tl.constexpr, SOFTCAP: tl.constexpr, D_WIDTHS: tl.constexpr, E_WIDTHS: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr, PAGE: tl.constexpr, FEWEST: tl.constexpr,
    MOST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Every slots-th split of a tile of rows: o and lse if it is the only one, else its sums."""
    scale, softcap = tl.cast(scale, tl.float32), tl.cast(softcap, tl.float32)
    # tiles that share keys run side by side; late splits, which may not exist, run last
    p, tiles = tl.program_id(0), tl.cdiv(T * groups, BLOCK_M)
    g, b = (p // tiles % K).to(tl.int64), (p // tiles // K % B).to(tl.int64)
    slot = p // tiles // K // B
    r = p % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    t, h, live = r // groups, g * groups + r % groups, r < T * groups
    bounds = Bounds(first_ptr, last_ptr, b * bound_b, bound_t, places_ptr, b * place_b, shift)
    rows = packed(bounds, r, T, S, groups)
    lo, hi, begin, each, count = partition(rows, FEWEST, MOST, BLOCK_S)
    if slot >= count:
        return

    head = h[:, None]
    scores = Scores(
        scale, softcap, Plane(alibi_ptr, b * alibi_b + head, 0, 0),
        Plane(keys_ptr, b * keys_b, 0, 1), Plane(allowed_ptr, b * a_b + head * a_h, a_t, a_s),
        Plane(bias_ptr, b * b_b + head * b_h, b_t, b_s), lowest,
    )  # fmt: skip
    k, v = Cache(k_ptr + g * k_h, k_b, k_s, D), Cache(v_ptr + g * v_h, v_b, v_s, E)
    if table_ptr is not None:
        table_ptr += b * table_b
    q = Head(q_ptr + b * q_b, 1, D, T, b, g)
    q_tile = load_rows(q, h * q_h + t.to(tl.int64) * q_t, live, D_WIDTHS, EXACT)
    for split in range(slot, count, slots):
        total, peak = tl.zeros((BLOCK_M,), tl.float32), tl.full((BLOCK_M,), -INF, tl.float32)
        if sinks_ptr is not None:
            sink = tl.load(sinks_ptr + h).to(tl.float32) * LOG2E
            alone = (count == 1) & (sink > -INF)
            total, peak = tl.where(alone, 1.0, total), tl.where(alone, sink, peak)
        start = begin + split * each
        acc, total, peak = _absorb(
            start, tl.minimum(start + each, hi), lo, hi, q_tile, k, v, b, table_ptr, rows, S,
            scores, zeros(BLOCK_M, E_WIDTHS), total, peak, SCORED, SOFTCAP, D_WIDTHS, E_WIDTHS,
            EXACT, PRECISION, PAGE, BLOCK_S,
        )  # fmt: skip
        # always r, but made in here: addresses made before the loop would fill its registers
        row = r + tl.minimum(split, 0)
        _store(
            row, b, g, T, K, groups, E, o_ptr, lse_ptr, parts_ptr, sums_ptr, split, splits, count,
            acc, total, peak, E_WIDTHS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["bound_b", "bound_t", "T", "S", "H", "groups", "splits"])
def fold(
    parts_ptr, sums_ptr, o_ptr, lse_ptr, first_ptr, last_ptr, sinks_ptr, E, bound_b, bound_t, T, S,
    H, groups, splits, FEWEST: tl.constexpr, MOST: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """o and lse of one row from the sums of its splits; none where `attend` had only one."""
    p = tl.program_id(0)
    t, h, b = p % T, p // T % H, (p // T // H).to(tl.int64)
    r = (t * groups + h % groups) // BLOCK_M * BLOCK_M + tl.arange(0, BLOCK_M)
    bounds = Bounds(first_ptr, last_ptr, b * bound_b, bound_t, None, 0, 0)
    rows = packed(bounds, r, T, S, groups)
    _, _, _, _, count = partition(rows, FEWEST, MOST, BLOCK_S)
    if count == 1:
        return
    i, e = tl.arange(0, MOST), tl.arange(0, BLOCK_E)
    there, at = i < count, p.to(tl.int64) * splits + i
    peaks = tl.load(sums_ptr + 2 * at, there, other=-INF)
    totals = tl.load(sums_ptr + 2 * at + 1, there, other=0.0)
    live = there[:, None] & (e < E)[None, :]
    parts = tl.load(parts_ptr + at[:, None] * E + e[None, :], live, other=0.0)
    peak = tl.max(peaks, 0, keep_dims=True)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + h).to(tl.float32) * LOG2E
        peak = tl.maximum(peak, sink)
    base = tl.where(peak == -INF, 0.0, peak)
    weights = tl.exp2(peaks - base)
    total = tl.sum(weights * totals, 0, keep_dims=True)
    if sinks_ptr is not None:
        total += tl.exp2(sink - base)
    acc = tl.sum(weights[:, None] * parts, 0, keep_dims=True)
    o, lse = settled((acc,), total, base)
    o_at = ((b * T + t) * H + h) * E + e[None, :]
    tl.store(o_ptr + o_at, o[0].to(o_ptr.dtype.element_ty), (e < E)[None, :])
    tl.store(lse_ptr + p + tl.arange(0, 1), lse)


_attend_at = Launcher(attend)
_fold_at = Launcher(fold)


class Tiling(NamedTuple):
    """Rows and keys of a tile, the fewest keys of a split and most splits, warps and stages.

    None depends on the batch, on lengths or on the cache's capacity.
    """

    rows: int
    keys: int
    fewest: int
    most: int
    warps: int
    stages: int


def width(D: int) -> int:
    """Features of a tile: what lies past D is not loaded, and loads are all that takes time."""
    return max(16, next_power_of_2(D))


def tiling(
    rows: int, K: int, D: int, E: int, itemsize: int, paged: bool, dense: bool, arch: int | None
) -> Tiling:
    """For `rows` rows that share each of K heads; dense: a mask or bias of each row's own."""
    # more rows would spill: of fp32, beside a dense mask, or 64 of 256 bytes that wgmma won't take
    wide = width(max(D, E)) * itemsize
    M = 16 if itemsize == 4 or dense else 64 if wide <= (256 if arch == 90 else 128) else 32
    M = min(M, max(16, next_power_of_2(rows)))
    keys = 128 if wide <= 128 and M == 16 else 64 if wide <= 256 else 32 if wide <= 512 else 16
    filled = (width(D), width(E)) == (D, E) or wide > 256
    keys = keys if filled else 64 if wide <= 128 else 32  # bounds of features take registers too
    # some 512 programs of 16 rows a sequence; sums that are written and read cost as much as keys
    most = 1 << (max(4, min(64, 512 * 16 // (K * cdiv(rows, M) * M))).bit_length() - 1)
    # pages' numbers come two tiles ahead of their keys, and these two ahead of their use
    stages = 2 if _AMD else 5 if paged else 3 if filled else 4
    return Tiling(M, keys, max(256, 8 * M), most, 4 if itemsize == 2 else 8, stages)


def fold_warps(E: int) -> int:
    """Warps of `fold`, whose program holds up to 64 sums of E features at once."""
    return 4 if E <= 128 else 8


def _bytes(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.view(torch.uint8)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    last: Tensor,
    places: Tensor | None,
    keys: Tensor | None,
    allowed: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    alibi: Tensor | None,
    block_table: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """o (B, T, H, E) and lse2 (B, H, T) in fp32; first and last are int32, (1 or B, 1 or T)."""
    (B, H, T, D), (_, K, S, E) = q.shape, v.shape
    if block_table is not None:
        S, block_table = S * block_table.shape[1], unit_rows(block_table)
    o = q.new_empty(B, T, H, E)
    lse = q.new_empty(B, H, T, dtype=torch.float32)
    if not B * H * T * E:
        return o, lse
    dense, paged = not (allowed is None and bias is None), block_table is not None
    tile = tiling(T * H // K, K, D, E, q.element_size(), paged, dense, arch(q.device))
    splits = max(1, min(tile.most, cdiv(S, tile.fewest)))
    parts = sums = None
    if splits > 1:
        parts = q.new_empty(B, H, T, splits, E, dtype=torch.float32)
        sums = q.new_empty(B, H, T, splits, 2, dtype=torch.float32)
    if _AMD and allowed is not None:
        bias = _hiding(allowed, bias)
        allowed = None
    sinks, alibi, places, keys = (
        None if t is None else t.contiguous() for t in (sinks, alibi, places, keys)
    )
    outputs = o, lse, parts, sums, first, last
    rest = places, block_table, sinks, alibi, _bytes(keys), _bytes(allowed), bias
    with guard(q):
        tensors = (unit_rows(q), unit_rows(k), unit_rows(v), *outputs, *rest)
        _attend(tensors, S, splits, scale, softcap, tile)
        if splits > 1:
            _fold_at(
                (B * H * T, 1, 1),
                (parts, sums, o, lse, first, last, sinks),
                (E,),
                (*strides_of(first), T, S, H, H // K, splits),
                (tile.fewest, tile.most, tile.rows, tile.keys, width(E)),
                fold_warps(E),
            )
    return o, lse


def _hiding(allowed: Tensor, bias: Tensor | None) -> Tensor:
    """The same mask in a bias: Triton 3.9 compiles no boolean one for AMD (triton PR 11422)."""
    bias = allowed.new_zeros((1, 1, 1, 1), dtype=torch.float32) if bias is None else bias
    return torch.where(allowed, bias, torch.finfo(bias.dtype).min)


def _attend(
    tensors: tuple[Any, ...], S: int, splits: int, scale: float, softcap: float, tile: Tiling
) -> None:
    """Launch `attend` on its tensors, for S keys in as many splits at most."""
    q, k, v, _, _, _, _, first, _, places, table, _, alibi, keys, allowed, bias = tensors
    (B, H, T, D), (_, K, page, E) = q.shape, v.shape
    units = cdiv(T * H // K, tile.rows) * K * B
    slots = cdiv(splits, max(1, units * splits // (PROGRAMS * multiprocessors(q.device))))
    lowest = 0.0 if bias is None else torch.finfo(bias.dtype).min
    scored = softcap != 0.0 or alibi is not None or bias is not None or scale <= 0.0
    of_d, of_e = width(D), width(E)
    _attend_at(
        (units * slots, 1, 1),
        tensors,
        (
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *strides_of(allowed),
            *strides_of(bias), D, E,
        ),
        (
            *strides_of(first), strides_of(places)[0], 0 if table is None else table.stride(0),
            H if alibi is not None and alibi.dim() == 2 else 0, strides_of(keys)[0], T, S, B, K,
            H // K, splits, slots, S - T, scale, softcap, lowest,
        ),
        (
            scored, softcap != 0.0, (of_d,), (of_e,), (of_d, of_e) == (D, E), "ieee",
            0 if table is None else page, tile.fewest, tile.most, tile.rows, tile.keys,
        ),
        tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
