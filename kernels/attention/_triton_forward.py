"""The forward kernel of attention: one tile of queries of one head a program.

The product of the next tile of keys is issued before the softmax of this one, so that the matrix
units work while the exponentials are taken.
"""

# pyright: reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from swathe.kernels.attention._triton_tiles import (
    LOG2E,
    Bounds,
    Dropout,
    Head,
    Plane,
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


@triton.jit
def weigh(
    s, rows, n, visible, bias, scores, total, peak, SCORED: tl.constexpr, SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: weights of a tile of scores, and what shrinks the sums."""
    z, factor, _ = logits(s, rows, n, visible, bias, scores, SCORED, SOFTCAP, MASKED)
    higher = tl.maximum(peak, tl.max(z, 1) * factor)
    base = higher
    if MASKED:
        # rows that have seen nothing yet have no peak to subtract
        base = tl.where(higher == float("-inf"), 0.0, higher)
    p, shrink = tl.exp2(z * factor - base[:, None]), tl.exp2(peak - base)
    return p, shrink, total * shrink + tl.sum(p, 1), higher


@triton.jit
def _gather(
    p, acc, v, start, rows, n, dropout, E_WIDTHS: tl.constexpr, EXACT: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """acc + p v of one tile of keys, some of whose weights may be dropped."""
    if dropout.seed is not None:
        p = tl.where(kept(dropout, rows, n), p, 0.0)
    # asked for no earlier: the wait for v would end the overlap of a product with the softmax
    values = load_tile(v, start, BLOCK_S, E_WIDTHS, EXACT, TMA)
    return added(acc, p.to(values[0].dtype), values, PRECISION)


@triton.jit
def _attend(
    lo, hi, s, q, k, v, rows, S, scores, dropout, acc, total, peak, SCORED: tl.constexpr,
    SOFTCAP: tl.constexpr, MASKED: tl.constexpr, D_WIDTHS: tl.constexpr, E_WIDTHS: tl.constexpr,
    EXACT: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Absorb the key tiles from lo to hi, of which s is the first; leaves the one at hi in s."""
    for start in range(lo, hi, BLOCK_S):
        k_ahead = load_tile(k, start + BLOCK_S, BLOCK_S, D_WIDTHS, EXACT, TMA)
        s_ahead = product(q, k_ahead, PRECISION)
        n = (start + tl.arange(0, BLOCK_S))[None, :]
        visible, bias = visibility(rows, n, S, scores)
        p, shrink, total, peak = weigh(
            s, rows, n, visible, bias, scores, total, peak, SCORED, SOFTCAP, MASKED
        )
        acc = scaled(acc, shrink[:, None])
        acc = _gather(p, acc, v, start, rows, n, dropout, E_WIDTHS, EXACT, TMA, PRECISION, BLOCK_S)
        s = s_ahead
    return s, acc, total, peak


@triton.jit
def _attend_ahead(
    lo, whole_from, whole_to, hi, q, k, v, rows, S, scores, dropout, acc, total, peak,
    SCORED: tl.constexpr, SOFTCAP: tl.constexpr, D_WIDTHS: tl.constexpr, E_WIDTHS: tl.constexpr,
    EXACT: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Absorb the key tiles from lo to hi; from whole_from to whole_to all rows see all keys."""
    # the last tile has none to look ahead to
    final = (hi - 1) // BLOCK_S * BLOCK_S
    whole_from = tl.minimum(tl.maximum(whole_from, lo), final)
    whole_to = tl.minimum(tl.maximum(whole_to, whole_from), final)
    s = product(q, load_tile(k, lo, BLOCK_S, D_WIDTHS, EXACT, TMA), PRECISION)
    for part in tl.static_range(3):
        s, acc, total, peak = _attend(
            lo if part == 0 else whole_from if part == 1 else whole_to,
            whole_from if part == 0 else whole_to if part == 1 else final,
            s, q, k, v, rows, S, scores, dropout, acc, total, peak, SCORED, SOFTCAP, part != 1,
            D_WIDTHS, E_WIDTHS, EXACT, TMA, PRECISION, BLOCK_S,
        )  # fmt: skip
    n = (final + tl.arange(0, BLOCK_S))[None, :]
    visible, bias = visibility(rows, n, S, scores)
    p, shrink, total, peak = weigh(
        s, rows, n, visible, bias, scores, total, peak, SCORED, SOFTCAP, True
    )
    acc = scaled(acc, shrink[:, None])
    acc = _gather(p, acc, v, final, rows, n, dropout, E_WIDTHS, EXACT, TMA, PRECISION, BLOCK_S)
    return acc, total, peak


@triton.jit
def _attend_masked(
    lo, hi, q, k, v, rows, S, scores, dropout, acc, total, peak, SCORED: tl.constexpr,
    SOFTCAP: tl.constexpr, D_WIDTHS: tl.constexpr, E_WIDTHS: tl.constexpr, EXACT: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Absorb the key tiles from lo to hi under a mask or bias of every single key."""
    for start in range(lo, hi, BLOCK_S):
        n = (start + tl.arange(0, BLOCK_S))[None, :]
        visible, bias = visibility(rows, n, S, scores)
        s = product(q, load_tile(k, start, BLOCK_S, D_WIDTHS, EXACT, TMA), PRECISION)
        p, shrink, total, peak = weigh(
            s, rows, n, visible, bias, scores, total, peak, SCORED, SOFTCAP, True
        )
        acc = scaled(acc, shrink[:, None])
        acc = _gather(p, acc, v, start, rows, n, dropout, E_WIDTHS, EXACT, TMA, PRECISION, BLOCK_S)
    return acc, total, peak


@triton.jit
def start_of_softmax(sinks_ptr, h, M: tl.constexpr):
    """Total and peak of M rows before their first key; a sink is a key that they start with."""
    peak, total = tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + h).to(tl.float32) * LOG2E
        peak, total = tl.zeros_like(peak) + sink, total + tl.where(sink > float("-inf"), 1.0, 0.0)
    return total, peak


@triton.jit
def settled(acc, total, peak):
    """o of rows whose keys are all absorbed, and lse2; 0 and -inf where there was none."""
    some = total != 0
    safe = tl.where(some, total, 1.0)
    share = tl.where(some, 1.0 / safe, 0.0)
    lse = tl.where(some, peak + tl.log2(safe), float("-inf"))
    return scaled(acc, share[:, None]), lse


@triton.jit
def stretches(rows, S, THROUGHOUT: tl.constexpr, BLOCK_S: tl.constexpr):
    """Where the key tiles that a tile of rows sees start and end, and those that all see whole.

    THROUGHOUT: a mask or bias says of every single key whether it is seen, and none is whole.
    """
    lo, hi = tl.min(rows.first), tl.max(rows.last)
    lo = tl.minimum(lo, hi) // BLOCK_S * BLOCK_S
    whole_from, whole_to = hi, hi
    if not THROUGHOUT:
        whole_from = tl.cdiv(tl.max(tl.where(rows.live, rows.first, 0)), BLOCK_S) * BLOCK_S
        whole_to = tl.min(tl.where(rows.live, rows.last, S)) // BLOCK_S * BLOCK_S
    return lo, whole_from, whole_to, hi


PLAIN = ["T", "S", "H", "groups", "shift", "scale", "softcap", "lowest", "probability"]


@triton.jit(do_not_specialize=PLAIN)
def forward(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, first_ptr, last_ptr, places_ptr, sinks_ptr, alibi_ptr,
    keys_ptr, allowed_ptr, bias_ptr, seed_ptr, q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, o_b,
    o_h, o_t, bound_b, bound_t, place_b, alibi_b, keys_b, a_b, a_h, a_t, a_s, b_b, b_h, b_t, b_s,
    D, E, T, S, H, groups, shift, scale, softcap, lowest, probability, SCORED: tl.constexpr,
    SOFTCAP: tl.constexpr, D_WIDTHS: tl.constexpr, E_WIDTHS: tl.constexpr, EXACT: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """o and lse of one tile of queries of one head."""
    scale, softcap = tl.cast(scale, tl.float32), tl.cast(softcap, tl.float32)
    tile, h, g, b = place(tl.cdiv(T, BLOCK_T), H, groups)
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
    if not TMA:
        k_ptr += b * k_b + g * k_h
        v_ptr += b * v_b + g * v_h
    # no row sees a key past hi, and what lies there may be anything
    k, v = Head(k_ptr, k_s, D, hi, b, g), Head(v_ptr, v_s, E, hi, b, g)
    q_tile = load_tile(q, begin, BLOCK_T, D_WIDTHS, EXACT, False)
    acc = zeros(BLOCK_T, E_WIDTHS)
    total, peak = start_of_softmax(sinks_ptr, h, BLOCK_T)

    if THROUGHOUT:
        acc, total, peak = _attend_masked(
            lo, hi, q_tile, k, v, rows, S, scores, dropout, acc, total, peak, SCORED, SOFTCAP,
            D_WIDTHS, E_WIDTHS, EXACT, TMA, PRECISION, BLOCK_S,
        )  # fmt: skip
    elif lo < hi:
        acc, total, peak = _attend_ahead(
            lo, whole_from, whole_to, hi, q_tile, k, v, rows, S, scores, dropout, acc, total, peak,
            SCORED, SOFTCAP, D_WIDTHS, E_WIDTHS, EXACT, TMA, PRECISION, BLOCK_S,
        )  # fmt: skip
    if dropout.seed is not None:
        acc = scaled(acc, 1.0 / (1.0 - dropout.probability))
    acc, lse = settled(acc, total, peak)
    store_tile(Head(o_ptr + b * o_b + h * o_h, o_t, E, T, b, h), begin, acc, BLOCK_T, E_WIDTHS)
    row = begin + tl.arange(0, BLOCK_T)
    tl.store(lse_ptr + (b * H + h) * T + row, lse, row < T)
