"""The backward kernels of attention: dq by tiles of queries, dk and dv by tiles of keys, dbias.

`backward_q` runs first: it owns whole rows, so it also finds delta and which keys its rows reach.
`backward_kv` works on transposed tiles (keys, queries), so that p^T and ds^T come out as the left
operands of its products.
"""

# pyright: reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from swathe.kernels.attention._triton_forward import PLAIN, stretches
from swathe.kernels.attention._triton_tiles import (
    FAR,
    LOG2E,
    Bounds,
    Dropout,
    Head,
    Plane,
    Queries,
    Scores,
    added,
    kept,
    load_tile,
    logits,
    place,
    product,
    queries,
    scaled,
    store_tile,
    visibility,
    zeros,
)

ROUND = tl.constexpr(128)  # rows of `stats` and `seen` are rounded up to this


@triton.jit
def slopes(
    s, dp, lse, delta, rows, n, S, scores, dropout, SCORED: tl.constexpr, SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """p after dropout, ds without its scale, and dz: what a bias added to the scores receives."""
    visible, bias = visibility(rows, n, S, scores)
    z, factor, t = logits(s, rows, n, visible, bias, scores, SCORED, SOFTCAP, MASKED)
    p = tl.exp2(z * factor - lse)
    weight = p
    if dropout.seed is not None:
        keep, larger = kept(dropout, rows, n), 1.0 / (1.0 - dropout.probability)
        weight, dp = tl.where(keep, p * larger, 0.0), tl.where(keep, dp * larger, 0.0)
    dz = p * (dp - delta)
    ds = dz
    if SOFTCAP:
        ds = dz * (1.0 - t * t)
    return weight, ds, dz


@triton.jit
def _descend(
    lo, hi, dq, q, do, k, v, lse, delta, rows, S, scores, dropout, SCORED: tl.constexpr,
    SOFTCAP: tl.constexpr, MASKED: tl.constexpr, D_WIDTHS: tl.constexpr, E_WIDTHS: tl.constexpr,
    EXACT: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dq over the key tiles from lo to hi."""
    for start in range(lo, hi, BLOCK_S):
        n = (start + tl.arange(0, BLOCK_S))[None, :]
        k_tile = load_tile(k, start, BLOCK_S, D_WIDTHS, EXACT, TMA)
        s = product(q, k_tile, PRECISION)
        v_tile = load_tile(v, start, BLOCK_S, E_WIDTHS, EXACT, TMA)
        dp = product(do, v_tile, PRECISION)
        _, ds, _ = slopes(s, dp, lse, delta, rows, n, S, scores, dropout, SCORED, SOFTCAP, MASKED)
        dq = added(dq, ds.to(k_tile[0].dtype), k_tile, PRECISION)
    return dq


@triton.jit
def _delta(do, o, M: tl.constexpr):
    """The sum of do * o of every row."""
    total = tl.zeros((M,), tl.float32)
    for i in tl.static_range(len(o)):
        total += tl.sum(do[i].to(tl.float32) * o[i].to(tl.float32), 1)
    return total


@triton.jit
def _row_stats(do, o, lse_at, dlse_at, row, T, M: tl.constexpr):
    """lse2 and delta; a row that sees nothing has no weight: its lse2 is inf."""
    delta = _delta(do, o, M)
    if dlse_at is not None:
        delta -= tl.load(dlse_at + row, row < T, other=0.0) * LOG2E
    lse = tl.load(lse_at + row, row < T, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse), delta


@triton.jit
def _store_stats(stats, span, row, lse, delta, seen, rows, reach, lo, hi, h, M: tl.constexpr):
    """What `backward_kv` needs of rows, of those past the last as well: it masks no row."""
    tl.store(stats + row, lse)
    tl.store(stats + span + row, delta)
    if h == 0:
        tl.store(seen + row, tl.reshape(rows.first, M))
        tl.store(seen + span + row, tl.reshape(rows.last, M))
        tl.store(reach, lo)
        tl.store(reach + 1, hi)


@triton.jit
def _rows_that_reach(reach, tiles, start, end, BLOCK: tl.constexpr):
    """The row tiles from the first to the last that see any key of [start, end)."""
    begin, stop = tiles, 0
    for block in range(0, tiles, BLOCK):
        tile = block + tl.arange(0, BLOCK)
        there, at = tile < tiles, reach + 2 * tile
        hit = (tl.load(at, there, other=FAR) < end) & (tl.load(at + 1, there, other=0) > start)
        begin = tl.minimum(begin, tl.min(tl.where(hit, tile, tiles)))
        stop = tl.maximum(stop, tl.max(tl.where(hit, tile + 1, 0)))
    return begin, stop


@triton.jit(do_not_specialize=PLAIN)
def backward_q(
    do_ptr, dlse_ptr, q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, dq_ptr, stats_ptr, seen_ptr, reach_ptr,
    first_ptr, last_ptr, places_ptr, alibi_ptr, keys_ptr, allowed_ptr, bias_ptr, seed_ptr, do_b,
    do_h, do_t, q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_t, dq_b, dq_h, dq_t,
    bound_b, bound_t, place_b, alibi_b, keys_b, a_b, a_h, a_t, a_s, b_b, b_h, b_t, b_s, D, E, T, S,
    H, groups, shift, scale, softcap, lowest, probability, SCORED: tl.constexpr,
    SOFTCAP: tl.constexpr, D_WIDTHS: tl.constexpr, E_WIDTHS: tl.constexpr, EXACT: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries of one head; delta and its rows' reach on the way."""
    scale, softcap = tl.cast(scale, tl.float32), tl.cast(softcap, tl.float32)
    tiles = tl.cdiv(T, BLOCK_T)
    tile, h, g, b = place(tiles, H, groups)
    begin = tile * BLOCK_T
    scores = Scores(
        scale, softcap, Plane(alibi_ptr, b * alibi_b + h, 0, 0), Plane(keys_ptr, b * keys_b, 0, 1),
        Plane(allowed_ptr, b * a_b + h * a_h, a_t, a_s),
        Plane(bias_ptr, b * b_b + h * b_h, b_t, b_s), lowest,
    )  # fmt: skip
    bounds = Bounds(first_ptr, last_ptr, b * bound_b, bound_t, places_ptr, b * place_b, shift)
    dropout = Dropout(seed_ptr, b * H + h, tl.cast(probability, tl.float32))
    rows = queries(bounds, begin, T, S, BLOCK_T, 1)
    THROUGHOUT: tl.constexpr = not (keys_ptr is None and allowed_ptr is None and bias_ptr is None)
    lo, whole_from, whole_to, hi = stretches(rows, S, THROUGHOUT, BLOCK_S)

    q = Head(q_ptr + b * q_b + h * q_h, q_t, D, T, b, h)
    do = Head(do_ptr + b * do_b + h * do_h, do_t, E, T, b, h)
    o = Head(o_ptr + b * o_b + h * o_h, o_t, E, T, b, h)
    q_tile = load_tile(q, begin, BLOCK_T, D_WIDTHS, EXACT, False)
    do_tile = load_tile(do, begin, BLOCK_T, E_WIDTHS, EXACT, False)
    o_tile = load_tile(o, begin, BLOCK_T, E_WIDTHS, EXACT, False)
    row, span, at = begin + tl.arange(0, BLOCK_T), tl.cdiv(T, ROUND) * ROUND, (b * H + h) * T
    if dlse_ptr is not None:
        dlse_ptr += at
    lse, delta = _row_stats(do_tile, o_tile, lse_ptr + at, dlse_ptr, row, T, BLOCK_T)
    _store_stats(
        stats_ptr + (b * H + h) * 2 * span, span, row, lse, delta, seen_ptr + b * 2 * span, rows,
        reach_ptr + (b * tiles + tile) * 2, lo, hi, h, BLOCK_T,
    )  # fmt: skip
    lse, delta = lse[:, None], delta[:, None]

    if not TMA:
        k_ptr += b * k_b + g * k_h
        v_ptr += b * v_b + g * v_h
    # no row sees a key past hi, and what lies there may be anything
    k, v = Head(k_ptr, k_s, D, hi, b, g), Head(v_ptr, v_s, E, hi, b, g)
    whole_from = tl.minimum(tl.maximum(whole_from, lo), tl.maximum(hi, lo))
    whole_to = tl.maximum(whole_to, whole_from)
    dq = zeros(BLOCK_T, D_WIDTHS)
    for part in tl.static_range(1 if THROUGHOUT else 3):
        dq = _descend(
            lo if part == 0 else whole_from if part == 1 else whole_to,
            whole_from if part == 0 else whole_to if part == 1 else hi,
            dq, q_tile, do_tile, k, v, lse, delta, rows, S, scores, dropout, SCORED, SOFTCAP,
            part != 1, D_WIDTHS, E_WIDTHS, EXACT, TMA, PRECISION, BLOCK_S,
        )  # fmt: skip
    dq_head = Head(dq_ptr + b * dq_b + h * dq_h, dq_t, D, T, b, h)
    store_tile(dq_head, begin, scaled(dq, scale), BLOCK_T, D_WIDTHS)


@triton.jit
def _known_queries(bounds, start, T, BLOCK: tl.constexpr):
    """A tile of rows as `backward_q` left them: there for the rows past the last as well."""
    index = (start + tl.arange(0, BLOCK))[None, :]
    place = index + bounds.shift
    if bounds.places is not None:
        place = tl.load(bounds.places + bounds.place_skip + index, index < T, other=0)
    return Queries(
        index, index < T, tl.load(bounds.first + index), tl.load(bounds.last + index), place
    )


@triton.jit(do_not_specialize=PLAIN)
def backward_kv(
    k_ptr, v_ptr, q_ptr, do_ptr, stats_ptr, seen_ptr, reach_ptr, dk_ptr, dv_ptr, places_ptr,
    alibi_ptr, keys_ptr, allowed_ptr, bias_ptr, seed_ptr, do_b, do_h, do_t,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, dk_b, dk_h, dk_s, dv_b, dv_h, dv_s,
    place_b, alibi_b, keys_b, a_b, a_h, a_t, a_s, b_b, b_h, b_t, b_s, D, E, T, S, H,
    groups, shift, scale, softcap, lowest, probability, SCORED: tl.constexpr,
    SOFTCAP: tl.constexpr, D_WIDTHS: tl.constexpr, E_WIDTHS: tl.constexpr, EXACT: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    RATIO: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys of one head, over the queries of its whole group."""
    scale, softcap = tl.cast(scale, tl.float32), tl.cast(softcap, tl.float32)
    blocks, heads = tl.cdiv(S, BLOCK_S), H // groups
    start = tl.program_id(0) % blocks * BLOCK_S
    g = (tl.program_id(0) // blocks % heads).to(tl.int64)
    b = (tl.program_id(0) // blocks // heads).to(tl.int64)
    n = (start + tl.arange(0, BLOCK_S))[:, None]
    k = Head(k_ptr + b * k_b + g * k_h, k_s, D, S, b, g)
    v = Head(v_ptr + b * v_b + g * v_h, v_s, E, S, b, g)
    k_tile = load_tile(k, start, BLOCK_S, D_WIDTHS, EXACT, False)
    v_tile = load_tile(v, start, BLOCK_S, E_WIDTHS, EXACT, False)
    dk, dv = zeros(BLOCK_S, D_WIDTHS), zeros(BLOCK_S, E_WIDTHS)
    tiles = tl.cdiv(T, RATIO * BLOCK_T)
    span = tl.cdiv(T, ROUND) * ROUND
    seen = seen_ptr + b * 2 * span
    bounds = Bounds(seen, seen + span, 0, 1, places_ptr, b * place_b, shift)
    lo, hi = _rows_that_reach(reach_ptr + b * tiles * 2, tiles, start, start + BLOCK_S, 64)
    lo, count = lo * RATIO, tl.maximum(hi - lo, 0) * RATIO
    # one loop over the tiles of all heads of the group, so that loads run ahead from head to head
    for turn in range(0, groups * count):
        h = g * groups + turn // count
        begin = (lo + turn % count) * BLOCK_T
        q_at, do_at = q_ptr, do_ptr
        if not TMA:
            q_at, do_at = q_ptr + b * q_b + h * q_h, do_ptr + b * do_b + h * do_h
        q, do = Head(q_at, q_t, D, T, b, h), Head(do_at, do_t, E, T, b, h)
        scores = Scores(
            scale, softcap, Plane(alibi_ptr, b * alibi_b + h, 0, 0),
            Plane(keys_ptr, b * keys_b, 0, 1), Plane(allowed_ptr, b * a_b + h * a_h, a_t, a_s),
            Plane(bias_ptr, b * b_b + h * b_h, b_t, b_s), lowest,
        )  # fmt: skip
        dropout = Dropout(seed_ptr, b * H + h, tl.cast(probability, tl.float32))
        rows = _known_queries(bounds, begin, T, BLOCK_T)
        stats = stats_ptr + (b * H + h) * 2 * span + rows.index
        lse, delta = tl.load(stats), tl.load(stats + span)
        q_tile = load_tile(q, begin, BLOCK_T, D_WIDTHS, EXACT, TMA)
        s = product(k_tile, q_tile, PRECISION)
        do_tile = load_tile(do, begin, BLOCK_T, E_WIDTHS, EXACT, TMA)
        dp = product(v_tile, do_tile, PRECISION)
        p, ds, _ = slopes(s, dp, lse, delta, rows, n, S, scores, dropout, SCORED, SOFTCAP, True)
        dv = added(dv, p.to(do_tile[0].dtype), do_tile, PRECISION)
        dk = added(dk, ds.to(q_tile[0].dtype), q_tile, PRECISION)
    dk_head = Head(dk_ptr + b * dk_b + g * dk_h, dk_s, D, S, b, g)
    dv_head = Head(dv_ptr + b * dv_b + g * dv_h, dv_s, E, S, b, g)
    store_tile(dk_head, start, scaled(dk, scale), BLOCK_S, D_WIDTHS)
    store_tile(dv_head, start, dv, BLOCK_S, E_WIDTHS)


@triton.jit(do_not_specialize=[*PLAIN, "B", "of_b", "of_h", "of_t", "of_s"])
def backward_bias(
    do_ptr, q_ptr, k_ptr, v_ptr, stats_ptr, dbias_ptr, first_ptr, last_ptr, places_ptr, alibi_ptr,
    keys_ptr, allowed_ptr, bias_ptr, seed_ptr, do_b, do_h, do_t, q_b, q_h, q_t, k_b, k_h, k_s, v_b,
    v_h, v_s, bound_b, bound_t, place_b, alibi_b, keys_b, a_b, a_h, a_t, a_s, b_b, b_h, b_t, b_s, D,
    E, T, S, H, groups, shift, scale, softcap, lowest, probability, B, of_b, of_h, of_t, of_s,
    SCORED: tl.constexpr, SOFTCAP: tl.constexpr, D_WIDTHS: tl.constexpr, E_WIDTHS: tl.constexpr,
    EXACT: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dbias (of_b, of_h, of_t, of_s): one tile, over all that it is broadcast to, in order."""
    scale, softcap = tl.cast(scale, tl.float32), tl.cast(softcap, tl.float32)
    tiles_t, tiles_s, p = tl.cdiv(of_t, BLOCK_T), tl.cdiv(of_s, BLOCK_S), tl.program_id(0)
    own_t, own_s = p // tiles_s % tiles_t * BLOCK_T, p % tiles_s * BLOCK_S
    own_h, own_b = p // tiles_s // tiles_t % of_h, p // tiles_s // tiles_t // of_h
    heads, batch = tl.where(of_h == 1, H, 1), tl.where(of_b == 1, B, 1)
    begins = tl.where(of_t == 1, tl.cdiv(T, BLOCK_T), 1)
    starts = tl.where(of_s == 1, tl.cdiv(S, BLOCK_S), 1)
    total = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
    span = tl.cdiv(T, ROUND) * ROUND
    for turn in range(0, batch * heads * begins * starts):
        start = own_s + turn % starts * BLOCK_S
        begin = own_t + turn // starts % begins * BLOCK_T
        h = (own_h + turn // starts // begins % heads).to(tl.int64)
        b = (own_b + turn // starts // begins // heads).to(tl.int64)
        g = h // groups
        scores = Scores(
            scale, softcap, Plane(alibi_ptr, b * alibi_b + h, 0, 0),
            Plane(keys_ptr, b * keys_b, 0, 1), Plane(allowed_ptr, b * a_b + h * a_h, a_t, a_s),
            Plane(bias_ptr, b * b_b + h * b_h, b_t, b_s), lowest,
        )  # fmt: skip
        dropout = Dropout(seed_ptr, b * H + h, tl.cast(probability, tl.float32))
        bounds = Bounds(first_ptr, last_ptr, b * bound_b, bound_t, places_ptr, b * place_b, shift)
        rows = queries(bounds, begin, T, S, BLOCK_T, 1)
        n = (start + tl.arange(0, BLOCK_S))[None, :]
        q = Head(q_ptr + b * q_b + h * q_h, q_t, D, T, b, h)
        do = Head(do_ptr + b * do_b + h * do_h, do_t, E, T, b, h)
        hi = tl.max(rows.last)
        k = Head(k_ptr + b * k_b + g * k_h, k_s, D, hi, b, g)
        v = Head(v_ptr + b * v_b + g * v_h, v_s, E, hi, b, g)
        q_tile = load_tile(q, begin, BLOCK_T, D_WIDTHS, EXACT, TMA)
        s = product(q_tile, load_tile(k, start, BLOCK_S, D_WIDTHS, EXACT, TMA), PRECISION)
        do_tile = load_tile(do, begin, BLOCK_T, E_WIDTHS, EXACT, TMA)
        dp = product(do_tile, load_tile(v, start, BLOCK_S, E_WIDTHS, EXACT, TMA), PRECISION)
        stats = stats_ptr + (b * H + h) * 2 * span + rows.index
        lse = tl.load(stats, rows.live, other=float("inf"))
        delta = tl.load(stats + span, rows.live, other=0.0)
        _, _, dz = slopes(s, dp, lse, delta, rows, n, S, scores, dropout, SCORED, SOFTCAP, True)
        total += dz
    t, s = (own_t + tl.arange(0, BLOCK_T))[:, None], (own_s + tl.arange(0, BLOCK_S))[None, :]
    if of_t == 1:
        total = tl.where(t == 0, tl.sum(total, 0)[None, :], total)
    if of_s == 1:
        total = tl.where(s == 0, tl.sum(total, 1)[:, None], total)
    head = (own_b.to(tl.int64) * of_h + own_h) * of_t
    at = dbias_ptr + (head + t) * of_s + s
    tl.store(at, total.to(dbias_ptr.dtype.element_ty), (t < of_t) & (s < of_s))
